"""What is written to disk: names, schemas, readers and writers of a run folder.

Owns the contract described in results/README.md. Derived latencies are not computed here (analysis/metrics.py).
Everything is written to a temporary file and renamed, so that a reader never sees half a file.
Nothing in a run folder is ever unpickled or evaluated. Heavy libraries are imported where they are used.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

SCHEMA_VERSION = 1

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
PLAN = "plan.json"
MANIFEST = "manifest.json"
STATUS = "status.json"
REQUESTS = "requests.parquet"
SWEEP = "sweep.csv"
SERVER_METRICS = "server_metrics.parquet"
RAW = "raw.parquet"
EXPERTS = "experts.npz"
REPORT = "report.html"
LOGS = "logs"
CHARTS = "charts"

RunState = Literal["running", "done", "failed", "cancelled"]
PointState = Literal["pending", "running", "done", "failed", "cancelled"]


def log_name(role: str, index: int) -> str:
    """Path of a process's log inside a run folder."""
    return f"{LOGS}/{role}-{index}.log"


# --- status.json ------------------------------------------------------------------------------------


@dataclass
class ClientProof:
    """The load generator's own part in a load point's figures (``loadgen/proof.py``)."""

    verdict: Literal["ok", "degraded", "client_limited"]
    reasons: list[str]
    transport: str  # socket: stamped by the kernel; aiohttp: when the process had the bytes
    workers: int
    lag_p50_ms: float  # process had the bytes minus kernel received them
    lag_p99_ms: float
    lag_max_ms: float
    coalesced: float  # share of chunks that shared a read with the one before
    held: float  # requests in flight / asked for, over the time in which all slots were in use
    schedule_lag_p50_ms: float  # sent minus due
    schedule_lag_p99_ms: float
    schedule_lag_max_ms: float
    cpu_share: float  # of its time the busiest process computed
    cpu_ms_per_1000_tokens: float  # all processes, reading the answers afterwards included
    peak_rss_mb: float  # of the largest process
    connections_opened: int  # while requests were measured
    resent: int
    clock_steps: int
    token_count_mismatches: int  # ok requests in which chunks and usage count differently
    length_mismatches: int  # ok requests that are not as long as asked


@dataclass
class PointStatus:
    concurrency: int
    state: PointState = "pending"
    reason: str = ""
    request_rate: float = 0.0  # requests a second; 0: as fast as ``concurrency`` allows
    good_share: float | None = None  # of the measured requests that met the objectives; null: none were given
    client: ClientProof | None = None


@dataclass
class RunStatus:
    """``status.json``: how far a run is, and why it ended as it did."""

    state: RunState = "running"
    reason: str = ""
    points: list[PointStatus] = field(default_factory=list)


def write_status(folder: Path, status: RunStatus) -> None:
    write_json(folder / STATUS, asdict(status))


def read_status(folder: Path) -> RunStatus:
    return msgspec.json.decode((folder / STATUS).read_bytes(), type=RunStatus)


# --- requests.parquet -------------------------------------------------------------------------------


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
    status: Literal["ok", "error", "timeout", "cancelled"]
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
    import pyarrow as pa

    kinds: dict[Any, Any] = {
        int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string(),
        list[float]: pa.list_(pa.float64()), list[int]: pa.list_(pa.int32()),
    }  # fmt: skip
    hints = typing.get_type_hints(RequestRecord)
    columns = [(name, kinds.get(hint, pa.string())) for name, hint in hints.items()]
    return pa.schema(columns, metadata={"schema_version": str(SCHEMA_VERSION)})


def requests_table(records: Sequence[RequestRecord]) -> pa.Table:
    import pyarrow as pa

    schema = requests_schema()
    return pa.table({name: [getattr(record, name) for record in records] for name in schema.names}, schema=schema)


def write_requests(folder: Path, records: Sequence[RequestRecord] | pa.Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = records if isinstance(records, pa.Table) else requests_table(records)
    with replacing(folder / REQUESTS, "wb") as out:
        pq.write_table(table, out, compression="zstd")


def read_requests(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(folder / REQUESTS, columns=columns)


# --- sweep.csv --------------------------------------------------------------------------------------

SWEEP_COLUMNS: tuple[str, ...] = (
    "concurrency", "requests", "failed", "duration_s", "isl_mean", "osl_mean",
    *(f"{name}_{stat}_ms" for name in ("ttft", "itl", "tpot", "e2e") for stat in ("mean", "p50", "p90", "p99")),
    "output_tok_s", "output_tok_s_per_gpu", "output_tok_s_per_user", "total_tok_s",
    "balancedness_mean", "imbalance_max",
    "request_rate",
    *(f"{name}_sched_{stat}_ms" for name in ("ttft", "e2e") for stat in ("mean", "p50", "p90", "p99")),
)  # fmt: skip


def write_sweep(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """``rows`` hold every one of ``SWEEP_COLUMNS``; NaN is written as an empty cell."""
    with replacing(folder / SWEEP, "w") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(SWEEP_COLUMNS)
        for row in rows:
            writer.writerow([_cell(row[name]) for name in SWEEP_COLUMNS])


def read_sweep(folder: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(folder / SWEEP)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.6g}")
    return value


def raw_schema() -> pa.Schema:
    """``raw.parquet``: a row a request: the bytes of its answer, read by read, and the Unix nanoseconds of each."""
    import pyarrow as pa

    return pa.schema([("request_id", pa.string()), ("read_ns", pa.list_(pa.int64())), ("data", pa.list_(pa.binary()))])


def write_raw(folder: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with replacing(folder / RAW, "wb") as out:
        pq.write_table(table, out, compression="zstd")


# --- server_metrics.parquet -------------------------------------------------------------------------


@dataclass
class MetricSample:
    """One value that a server showed in its Prometheus text; a row of ``server_metrics.parquet``."""

    time: float  # Unix seconds, when it was asked
    url: str
    name: str
    labels: str  # JSON object, keys sorted
    value: float


def write_server_metrics(folder: Path, samples: Sequence[MetricSample]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "time": pa.float64(),
        "url": pa.string(),
        "name": pa.string(),
        "labels": pa.string(),
        "value": pa.float64(),
    }
    columns = {name: pa.array([getattr(one, name) for one in samples], kind) for name, kind in kinds.items()}
    with replacing(folder / SERVER_METRICS, "wb") as out:
        pq.write_table(pa.table(columns), out, compression="zstd")


def read_server_metrics(folder: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(folder / SERVER_METRICS)


# --- experts.npz ------------------------------------------------------------------------------------


@dataclass
class ExpertCounts:
    """``experts.npz``: how many (token, expert) assignments the gate made, in windows of forward passes.

    Attributes:
        counts: int64 [windows, layers, experts], summed over all ranks, logical experts.
        times: float64 [windows, 2], Unix seconds of a window's begin and end.
        placement: int32 [epochs, layers, slots], logical expert of each slot; slot s is on EP rank s // (slots / ep).
        placement_times: float64 [epochs], Unix seconds from which each placement holds.
        layer_ids: int32 [layers], the model's index of each MoE layer.
        ep_size: EP ranks.
    """

    counts: np.ndarray
    times: np.ndarray
    placement: np.ndarray
    placement_times: np.ndarray
    layer_ids: np.ndarray
    ep_size: int


def write_experts(path: Path, experts: ExpertCounts) -> None:
    import numpy as np

    with replacing(path, "wb") as out:
        np.savez_compressed(out, version=SCHEMA_VERSION, **asdict(experts))


def read_experts(path: Path) -> ExpertCounts:
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in ExpertCounts.__dataclass_fields__ if name != "ep_size"}
        return ExpertCounts(**arrays, ep_size=int(data["ep_size"]))


# --- files ------------------------------------------------------------------------------------------


def new_run_folder(results_dir: Path, exp: str) -> Path:
    """Makes ``<results_dir>/<exp>/<YYYYmmdd-HHMMSS>/`` with logs/ and charts/, and points ``latest`` at it."""
    parent = results_dir / exp
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(1, 100))):
        folder = parent / f"{stamp}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    else:
        raise FileExistsError(f"{parent}/{stamp} and 99 more exist already")
    (folder / LOGS).mkdir()
    (folder / CHARTS).mkdir()
    link = parent / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(parent / "latest")
    return folder


def write_json(path: Path, value: Any) -> None:
    with replacing(path, "w") as out:
        json.dump(value, out, indent=2)
        out.write("\n")


@contextlib.contextmanager
def replacing(path: Path, mode: Literal["w", "wb"]) -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` that takes its place when the block ends without an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open(mode) as out:
            yield out
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
