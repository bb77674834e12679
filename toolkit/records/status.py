"""``status.json``: how far a run is, why it ended, and what the load generator says of its own part.

Does not know who writes it when (``loadgen/ledger.py`` for load points, the launcher for the last word).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from toolkit.records import STATUS
from toolkit.records.files import write_json

RunState = Literal["queued", "running", "done", "failed", "cancelled"]
PointState = Literal["pending", "running", "done", "invalid", "failed", "cancelled"]


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
    good_share: float | None = None  # of the ok and failed requests that met the objectives; null: there are none
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
