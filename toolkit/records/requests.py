"""``requests.parquet``, a row for each request as the client saw it, and ``raw.parquet``, the bytes of its answer.

Does not know how they were measured (``loadgen/answers.py``) or what is derived of them (``analysis/metrics.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from toolkit.records import RAW, REQUESTS
from toolkit.records.tables import read_table, schema_of, to_table, write_table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NOT_FAILED = ("ok", "cancelled", "interrupted")  # a request with any other status has failed
CUT_OFF = "the run was interrupted"  # the error of an interrupted request, also in files that call it cancelled


@dataclass
class RequestRecord:
    """One request as the client saw it; a row of ``requests.parquet``.

    ``t_send`` is Unix time in seconds; every ``*_s`` is seconds after it on the monotonic clock, NaN when it
    did not happen. ``chunk_s`` and ``chunk_tokens`` describe the chunks that carried tokens.
    """

    point: int  # index of the load point in the sweep
    concurrency: int
    request_id: str
    prompt_id: str
    warmup: bool
    status: Literal["ok", "error", "timeout", "cancelled", "interrupted"]  # given up as asked; with its load point
    error: str
    http_status: int  # 0: no answer
    t_send: float
    scheduled_s: float  # when it should have been sent; <= 0
    first_byte_s: float
    first_token_s: float
    last_token_s: float
    end_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    expected_output_tokens: int  # 0: not asked for
    finish_reason: str
    dp_rank: int  # rank that served it, from the x-dp-rank header; -1: unknown
    chunk_s: list[float]
    chunk_tokens: list[int]
    output_text: str
    first_visible_s: float = math.nan  # first chunk with content or a tool call, not reasoning
    reasoning_tokens: int = 0  # of output_tokens, as the server counts them
    token_source: str = ""  # of output_tokens: usage (the server's count), chunks (events with text)
    coalesced: int = 0  # chunks that came in one read with the one before: their time is an upper bound
    resent: int = 0  # sent again because an idle connection had been closed; nothing had come then
    session: str = ""  # conversation it is a turn of; empty: none
    turn: int = 0


def requests_schema() -> pa.Schema:
    return schema_of(RequestRecord)


def requests_table(records: Sequence[RequestRecord]) -> pa.Table:
    return to_table(RequestRecord, records)


def write_requests(folder: Path, records: Sequence[RequestRecord] | pa.Table) -> None:
    write_table(folder / REQUESTS, requests_table(records) if isinstance(records, Sequence) else records)


def read_requests(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Rows of version 1 too, where a request that was cut off was ``cancelled``: its error tells."""
    table = read_table(folder / REQUESTS, columns)
    if {"status", "error"} <= set(table.columns):
        cut_off = (table["status"] == "cancelled") & (table["error"] == CUT_OFF)
        table["status"] = table["status"].mask(cut_off, "interrupted")
    return table


def raw_schema() -> pa.Schema:
    """``raw.parquet``: a row a request: the bytes of its answer, read by read, and the Unix nanoseconds of each."""
    import pyarrow as pa

    return pa.schema([("request_id", pa.string()), ("read_ns", pa.list_(pa.int64())), ("data", pa.list_(pa.binary()))])


def write_raw(folder: Path, table: pa.Table) -> None:
    write_table(folder / RAW, table)
