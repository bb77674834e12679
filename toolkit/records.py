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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
PROFILES = "profiles"
REPORT = "report.html"
LOGS = "logs"
CHARTS = "charts"
STEPS = "steps"
WORKERS = "workers"  # a folder for each worker but the main one, with the same files
TRANSFERS = "transfers"
NODES = "nodes.parquet"
NODE_SAMPLES = "nodes"
ATTEMPTS = "attempts"
REBALANCES = "rebalances.jsonl"

Row = typing.TypeVar("Row", bound=tuple[Any, ...])
RunState = Literal["queued", "running", "done", "failed", "cancelled"]
PointState = Literal["pending", "running", "done", "invalid", "failed", "cancelled"]


def log_name(role: str, index: int) -> str:
    """Path of a process's log inside a run folder."""
    return f"{LOGS}/{role}-{index}.log"


def attempt_folder(folder: Path, number: int) -> Path:
    """Where the files of an attempt that is over lie, once the run has been taken up again."""
    return folder / ATTEMPTS / str(number)


def attempt_folders(folder: Path) -> list[Path]:
    """The folders of all attempts at a run, the first one first; the last is the run folder itself."""
    earlier = [path for path in (folder / ATTEMPTS).glob("*") if path.name.isdigit()]
    return [*sorted(earlier, key=lambda path: int(path.name)), folder]


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
    clock_offset_ms: float = 0.0  # largest between the nodes that sent; rows are moved by it


@dataclass
class PointStatus:
    concurrency: int
    state: PointState = "pending"
    reason: str = ""
    request_rate: float = 0.0  # requests a second; 0: as fast as ``concurrency`` allows
    good_share: float | None = None  # of the measured requests that met the objectives; null: none were given
    client: ClientProof | None = None
    repeat: int = 0  # which of load.repeat passes over the sweep it belongs to
    key: str = ""  # hash of what matters to its figures (point_files.py); empty: not known
    attempt: int = 1  # of the run, in which it was measured
    ended: float = 0.0  # Unix seconds


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
    return schema_of(RequestRecord)


def requests_table(records: Sequence[RequestRecord]) -> pa.Table:
    return to_table(RequestRecord, records)


def write_requests(folder: Path, records: Sequence[RequestRecord] | pa.Table) -> None:
    write_table(folder / REQUESTS, requests_table(records) if isinstance(records, Sequence) else records)


def read_requests(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    return read_table(folder / REQUESTS, columns)


# --- steps/, server_metrics.parquet, nodes.parquet --------------------------------------------------


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


@dataclass
class MetricSample:
    """One sample of a server's ``/metrics``; a row of ``server_metrics.parquet``."""

    time: float  # Unix seconds of the scrape
    url: str
    name: str  # as the server spells it, ``_total`` and ``_bucket`` included
    labels: str  # JSON object
    value: float


HOST = -1  # in the place of a GPU's number: a row of the node itself


class NodeSample(typing.NamedTuple):
    """One look at one GPU, or at a node itself (``gpu`` is ``HOST``); a row of ``nodes.parquet``. NaN: not known."""

    time: float  # Unix seconds
    node: str
    gpu: int
    utilization: float = math.nan  # 0 to 1; of all CPUs for the node
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    power_w: float = math.nan  # of the GPU; of the CPU packages (RAPL) for the node
    temperature_c: float = math.nan
    sm_clock_mhz: float = math.nan
    mem_clock_mhz: float = math.nan
    throttle: int = 0  # why the clock is not higher: NVML's bits (nvmlClocksThrottleReason*)
    net_rx_bytes: float = math.nan  # since boot, all interfaces
    net_tx_bytes: float = math.nan
    rdma_rx_bytes: float = math.nan  # since boot, all ports
    rdma_tx_bytes: float = math.nan


def steps_path(folder: Path, rank: int) -> Path:
    return folder / STEPS / f"rank-{rank}.arrows"


def transfers_path(folder: Path, worker: str, rank: int) -> Path:
    return folder / TRANSFERS / f"{worker}-{rank}.arrows"


def open_steps(path: Path) -> contextlib.AbstractContextManager[Callable[[Sequence[StepRecord]], None]]:
    return open_rows(path, StepRecord)


@contextlib.contextmanager
def open_rows(path: Path, record: type[Row]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Opens an Arrow stream of ``record``; each call of what it yields appends rows that a reader then sees."""
    import pyarrow as pa

    schema = schema_of(record)
    with path.open("wb") as out, pa.ipc.new_stream(out, schema) as stream:

        def write(rows: Sequence[Row]) -> None:
            columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), schema)]
            stream.write_batch(pa.record_batch(columns, schema=schema))
            out.flush()

        yield write


def read_steps(folder: Path) -> pd.DataFrame:
    """All ranks' ``StepRecord``s in the order of time; see ``read_rows``."""
    return read_rows(folder / STEPS, StepRecord).sort_values(["t_begin", "dp_rank"], ignore_index=True)


def read_transfers(folder: Path) -> pd.DataFrame:
    """All ranks' ``TransferRecord``s in the order of time; see ``read_rows``."""
    return read_rows(folder / TRANSFERS, TransferRecord).sort_values(["t_join", "dp_rank"], ignore_index=True)


def read_rows(folder: Path, record: type) -> pd.DataFrame:
    """The rows of every Arrow stream of ``record`` in a folder; see ``read_streams``.

    Raises:
        FileNotFoundError: no rank left a file.
        ValueError: a file is not a stream of ``record``.
    """
    table = read_streams(folder, record)
    if table is None:
        raise FileNotFoundError(f"{folder} holds no rank's file")
    return typing.cast("pd.DataFrame", table.to_pandas())


def read_streams(folder: Path, record: type) -> pa.Table | None:
    """The rows of every Arrow stream of ``record`` in a folder; None where there is none.

    A file that is still written, or was cut off, gives its whole batches. Raises ``ValueError`` for other columns.
    """
    import pyarrow as pa

    files = sorted(folder.glob("*.arrows"))
    return pa.concat_tables([read_stream(path, record) for path in files]) if files else None


def read_stream(path: Path, record: type) -> pa.Table:
    """The rows of one Arrow stream; see ``read_streams``."""
    import pyarrow as pa

    schema = schema_of(record)
    batches: list[Any] = []
    with pa.memory_map(str(path)) as source:
        if source.size():
            stream = pa.ipc.open_stream(source)
            if stream.schema.names != schema.names:
                raise ValueError(f"{path.name} has columns {stream.schema.names}, not {schema.names}")
            with contextlib.suppress(StopIteration, pa.ArrowInvalid, OSError):  # the end, or where it is cut off
                while True:
                    batches.append(stream.read_next_batch())
    return pa.Table.from_batches(batches, schema=schema)


def write_stream(path: Path, table: pa.Table) -> None:
    """An Arrow stream of rows that are all there already."""
    import pyarrow as pa

    with replacing(path, "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)


# --- tables -----------------------------------------------------------------------------------------


def schema_of(record: type) -> pa.Schema:
    """Column names and types of a record class; a ``Literal`` is a string."""
    import pyarrow as pa

    kinds: dict[Any, Any] = {
        int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string(),
        list[float]: pa.list_(pa.float64()), list[int]: pa.list_(pa.int32()),
    }  # fmt: skip
    hints = typing.get_type_hints(record)
    columns = [(name, kinds.get(hint, pa.string())) for name, hint in hints.items()]
    return pa.schema(columns, metadata={"schema_version": str(SCHEMA_VERSION)})


def to_table(record: type, rows: Sequence[Any]) -> pa.Table:
    """``rows``, instances of ``record``, as an Arrow table."""
    import pyarrow as pa

    schema = schema_of(record)
    return pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema)


def write_table(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with replacing(path, "wb") as out:
        pq.write_table(table, out, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A parquet file; list columns stay in Arrow's flat layout: a million rows without a million objects."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=columns)
    frame = table.to_pandas(
        types_mapper=lambda kind: pd.ArrowDtype(kind) if pa.types.is_list(kind) else None,
        split_blocks=True,
        self_destruct=True,
    )
    return typing.cast("pd.DataFrame", frame)


# --- sweep.csv --------------------------------------------------------------------------------------

SWEEP_COLUMNS: tuple[str, ...] = (
    "concurrency", "requests", "failed", "duration_s", "isl_mean", "osl_mean",
    *(f"{name}_{stat}_ms" for name in ("ttft", "itl", "tpot", "e2e") for stat in ("mean", "p50", "p90", "p99")),
    "output_tok_s", "output_tok_s_per_gpu", "output_tok_s_per_user", "total_tok_s",
    "balancedness_mean", "imbalance_max", "steady_s", "steady_output_tok_s",
    "request_rate",
    *(f"{name}_{stat}_ms" for name in ("ttft_sched", "e2e_sched", "ttfb", "ttfo", "icl")
      for stat in ("mean", "p50", "p90", "p99")),
    *(f"steady_{name}_{stat}_ms" for name in ("ttft", "itl", "tpot", "e2e") for stat in ("p50", "p99")),
    "power_w", "output_tok_s_per_w", "repeat", "state", "reason",
)  # fmt: skip
SWEEP_TEXTS = ("state", "reason")


def write_sweep(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """``rows`` hold every one of ``SWEEP_COLUMNS``; NaN is written as an empty cell."""
    with replacing(folder / SWEEP, "w") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(SWEEP_COLUMNS)
        for row in rows:
            writer.writerow([_cell(row[name]) for name in SWEEP_COLUMNS])


def read_sweep(folder: Path) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(folder / SWEEP)
    return table.assign(**{name: table[name].fillna("").astype(str) for name in SWEEP_TEXTS if name in table})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, str):
        return " ".join(value.split())  # a reason may quote a server; one line a load point
    return value


def raw_schema() -> pa.Schema:
    """``raw.parquet``: a row a request: the bytes of its answer, read by read, and the Unix nanoseconds of each."""
    import pyarrow as pa

    return pa.schema([("request_id", pa.string()), ("read_ns", pa.list_(pa.int64())), ("data", pa.list_(pa.binary()))])


def write_raw(folder: Path, table: pa.Table) -> None:
    write_table(folder / RAW, table)


def write_server_metrics(folder: Path, samples: Sequence[MetricSample]) -> None:
    write_table(folder / SERVER_METRICS, to_table(MetricSample, samples))


def read_server_metrics(folder: Path) -> pd.DataFrame:
    return read_table(folder / SERVER_METRICS)


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
        pairs: int64 [layers, experts, experts], tokens that chose both experts, in a sample of the forward passes, all
            ranks, symmetric, zero diagonal; None where it was not counted.
        slot_counts: int64 [windows, layers, slots], rows that each slot received; None in files of older versions.
    """

    counts: np.ndarray
    times: np.ndarray
    placement: np.ndarray
    placement_times: np.ndarray
    layer_ids: np.ndarray
    ep_size: int
    pairs: np.ndarray | None = None
    slot_counts: np.ndarray | None = None


def write_experts(path: Path, experts: ExpertCounts) -> None:
    import numpy as np

    with replacing(path, "wb") as out:
        known = {name: value for name, value in vars(experts).items() if value is not None}
        np.savez_compressed(out, version=SCHEMA_VERSION, **known)


def read_experts(path: Path) -> ExpertCounts:
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        names = [name for name in ExpertCounts.__dataclass_fields__ if name != "ep_size"]
        arrays = {name: data[name] for name in names if name in data or name not in ("pairs", "slot_counts")}
        return ExpertCounts(**arrays, ep_size=int(data["ep_size"]))


# --- rebalances.jsonl -------------------------------------------------------------------------------


class RebalanceRecord(msgspec.Struct, frozen=True):
    """One rebalance of experts, as the first rank saw it; a line of ``rebalances.jsonl``. NaN is written as null.

    ``balancedness_before`` and ``_after`` are for the counts that it was planned from, with replicas sharing their
    expert's load evenly; ``_measured`` is of the rows that slots really received in the passes looked at.
    """

    number: int
    state: Literal["done", "aborted"]  # aborted: the chunks that were committed stay
    reason: str
    trigger: str  # iterations, request
    t_asked: float  # Unix seconds: planning began; moving began; the last chunk was committed
    t_begin: float
    t_end: float
    plan_s: float
    first_step: int
    last_step: int
    passes: int  # since the look before
    assignments: int  # (token, expert) assignments that the plan rests on
    balancedness_measured: float | None
    balancedness_before: float | None
    balancedness_after: float | None
    balancedness_bound: float | None
    layers: int  # that changed
    replanned_layers: int
    waiting_layers: int  # left for the next time: the budget was used up
    moved_slots: int  # that got an expert from another rank
    local_copies: int
    same_node_sends: int
    cross_node_sends: int
    same_node_bytes: int
    cross_node_bytes: int
    chunks: int
    pauses_ms: list[float]  # what steps waited for: starting the first chunk, then each commit with the next start
    transfers_ms: list[float]  # of each chunk, beside the steps, until all ranks had said that they have it
    sent_bytes: list[int] = []  # of each chunk, by the first rank
    link_ms: list[float] = []  # that its GPU took for them (and for copies on it), beside the steps; 0 on CPUs


def append_rebalance(folder: Path, record: RebalanceRecord) -> None:
    """Adds a line; msgspec writes NaN as null."""
    with (folder / REBALANCES).open("ab") as out:
        out.write(msgspec.json.encode(record) + b"\n")


def read_rebalances(folder: Path) -> list[RebalanceRecord]:
    """All whole lines; a last one that was cut off is left out."""
    lines = (folder / REBALANCES).read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=RebalanceRecord) for line in lines]


# --- files ------------------------------------------------------------------------------------------


def new_run_folder(results_dir: Path, exp: str, named: Path | None = None) -> Path:
    """Makes ``<results_dir>/<exp>/<YYYYmmdd-HHMMSS>/`` with logs/ and charts/, and points ``latest`` at it.

    Where the caller has ``named`` a folder, that one is made, and nothing points at it.
    """
    if named is not None:
        for name in (LOGS, CHARTS):
            (named / name).mkdir(parents=True, exist_ok=True)
        return named
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
