"""What ranks write while they serve: a row for each forward pass, and for each request whose KV came from a peer.

Does not know when rows are written (``engine/steplog.py``, ``engine/disagg/log.py``).
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.records import STEPS, TRANSFERS
from toolkit.records.streams import life, open_rows, read_rows, read_stream

if TYPE_CHECKING:
    import pandas as pd


class StepRecord(typing.NamedTuple):
    """One forward pass of one DP rank, as its leader saw it; a row of ``steps/rank-<R>.arrows``.

    All DP ranks make the same passes: rows with the same ``step`` are one pass of the whole worker.
    """

    step: int  # forward passes since start, equal on every rank
    t_begin: float  # Unix seconds
    duration_s: float  # forward, sampling and book-keeping; waiting for others in collectives is inside
    dp_rank: int
    tokens: int  # of this DP rank in this pass
    decode_tokens: int
    prefill_tokens: int
    running: int  # requests in the running batch after the pass
    waiting: int  # requests not admitted yet
    kv_used_tokens: int
    kv_total_tokens: int
    preemptions: int  # requests pushed out of the running batch since the row before


class TransferRecord(typing.NamedTuple):
    """One request whose prompt another worker computed; a row of ``transfers/<worker>-<R>.arrows``.

    Durations are seconds. TTFT is about prefill_queue + prefill + wait + (transfer - hidden) + join.
    """

    request_id: str  # as the server calls it (x-request-id)
    t_join: float  # Unix seconds: it has its KV and runs from now on
    worker: str  # the decode worker
    dp_rank: int  # of that worker
    tokens: int  # of the prompt
    bytes: int  # read by the leader of the DP rank: one rank's share
    prefill_queue_s: float  # before its first step on the prefill rank
    prefill_s: float  # from its first step to its first token
    place_s: float  # before it had a place and blocks on the decode rank; beside prefill, under bootstrap
    wait_s: float  # from the last ticket to the begin of the read
    transfer_s: float  # in which reads went on
    hidden_s: float  # of that, before the last ticket: beside the prompt's computation
    join_s: float  # from the end of the last read to its place in the batch: the rest of a step
    first_decode_s: float  # from there to the first token decoded here; NaN: there was none


def steps_path(folder: Path, rank: int) -> Path:
    return folder / STEPS / f"rank-{rank}.arrows"


def transfers_path(folder: Path, worker: str, rank: int) -> Path:
    return folder / TRANSFERS / f"{worker}-{rank}.arrows"


def open_steps(path: Path) -> contextlib.AbstractContextManager[Callable[[Sequence[StepRecord]], None]]:
    return open_rows(path, StepRecord)


def read_steps(folder: Path) -> pd.DataFrame:
    """All ranks' ``StepRecord``s in the order of time; see ``read_rows``.

    Where a worker was started anew, ``step`` counts on: no two passes share a number.
    """
    import pandas as pd

    offset = 0
    frames: list[pd.DataFrame] = []
    files = sorted((folder / STEPS).glob("*.arrows"), key=life)
    for _, of_one_start in groupby(files, key=life):
        tables = [read_stream(path, StepRecord).to_pandas() for path in of_one_start]
        for table in tables:
            table["step"] += offset
        offset = max((int(table["step"].max()) + 1 for table in tables if len(table)), default=offset)
        frames += tables
    if not frames:
        raise FileNotFoundError(f"{folder / STEPS} holds no rank's file")
    return pd.concat(frames).sort_values(["t_begin", "dp_rank"], ignore_index=True)


def read_transfers(folder: Path) -> pd.DataFrame:
    """All ranks' ``TransferRecord``s in the order of time; see ``read_rows``."""
    return read_rows(folder / TRANSFERS, TransferRecord).sort_values(["t_join", "dp_rank"], ignore_index=True)
