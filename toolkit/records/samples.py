"""Samples taken beside a run: servers' ``/metrics`` (``server_metrics.parquet``), nodes and GPUs (``nodes.parquet``).

Does not know who takes them: ``loadgen/around.py`` and ``launch/sampler.py``.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.records import SERVER_METRICS
from toolkit.records.tables import read_table, to_table, write_table

if TYPE_CHECKING:
    import pandas as pd


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


def write_server_metrics(folder: Path, samples: Sequence[MetricSample]) -> None:
    write_table(folder / SERVER_METRICS, to_table(MetricSample, samples))


def read_server_metrics(folder: Path) -> pd.DataFrame:
    return read_table(folder / SERVER_METRICS)
