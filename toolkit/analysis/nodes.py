"""What the nodes did while they were loaded: power of the GPUs, and the series that the chart of nodes draws.

Owns the figures that come from nodes.parquet (``records.samples.NodeSample``). Latency and throughput are metrics.py's.
Read next: charts/nodes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from toolkit.analysis.load import Run
from toolkit.analysis.metrics import interval
from toolkit.records.samples import HOST

Floats = NDArray[np.float64]

GB = 1e9


@dataclass(frozen=True)
class Series:
    """One figure of one node against time; NaN where it is not known."""

    node: str
    time: Floats
    value: Floats


@dataclass(frozen=True)
class Panel:
    """A figure of all nodes: its label with the unit, and a line a node."""

    label: str
    lines: list[Series]


def power_w(samples: pd.DataFrame, begin: float, end: float) -> float:
    """Mean power of all GPUs together between two moments (of the hosts, where no GPU is known); NaN: not known.

    The mean over time of each device, added up: devices that are sampled at other moments count alike.
    """
    if samples.empty or not end > begin:
        return np.nan
    rows = samples[(samples["time"] >= begin) & (samples["time"] <= end) & samples["power_w"].notna()]
    gpus = rows[rows["gpu"] != HOST]
    chosen = gpus if len(gpus) else rows
    means = chosen.groupby(["node", "gpu"])["power_w"].mean()
    return float(means.sum()) if len(means) else np.nan


def point_power(run: Run) -> list[float]:
    """``power_w`` over the measured requests of each load point."""
    return [power_w(run.nodes, *interval(point.requests)) for point in run.points]


def panels(samples: pd.DataFrame) -> list[Panel]:
    """The figures that any node has, in the order in which a reader looks for a cause."""
    gpus, hosts = samples[samples["gpu"] != HOST], samples[samples["gpu"] == HOST]
    found = [
        Panel("power of GPUs (W)", _by_node(gpus, "power_w", "sum")),
        Panel("slowest SM clock (MHz)", _by_node(gpus, "sm_clock_mhz", "min")),
        Panel("hottest GPU (°C)", _by_node(gpus, "temperature_c", "max")),
        Panel("power of CPUs (W)", _by_node(hosts, "power_w", "sum")),
        Panel("CPUs in use (%)", _by_node(hosts, "utilization", "sum", 100)),
        Panel("host memory (GB)", _by_node(hosts, "memory_used_bytes", "sum", 1 / GB)),
        Panel("network, in + out (GB/s)", _rates(hosts)),
    ]
    return [panel for panel in found if any(np.isfinite(line.value).any() for line in panel.lines)]


def throttled(samples: pd.DataFrame) -> dict[str, float]:
    """Share of the samples in which heat or a power brake held a GPU's clock down, for each GPU where they ever did."""
    gpus = samples[samples["gpu"] != HOST]
    if gpus.empty:
        return {}
    held = (gpus["throttle"].to_numpy(np.int64) & HELD_DOWN) != 0
    names = [f"{node} GPU {gpu}" for node, gpu in zip(gpus["node"], gpus["gpu"], strict=True)]
    share = pd.Series(held).groupby(names).mean()
    return {str(name): float(value) for name, value in share.items() if value > 0}


# nvml.h, nvmlClocksThrottleReason*: HW slowdown, SW thermal, HW thermal, HW power brake. The software's power cap (0x4)
# is no fault: a GPU under full load meets it (H200, large GEMMs: 1,470 of 1,980 MHz at 690 W).
HELD_DOWN = 0x8 | 0x20 | 0x40 | 0x80


def _by_node(rows: pd.DataFrame, column: str, how: Literal["sum", "min", "max"], factor: float = 1.0) -> list[Series]:
    lines = []
    for node, of_node in rows.groupby("node"):
        by_time = of_node.groupby("time")[column]
        values = by_time.sum(min_count=1) if how == "sum" else by_time.min() if how == "min" else by_time.max()
        lines.append(Series(str(node), values.index.to_numpy(np.float64), values.to_numpy(np.float64) * factor))
    return lines


def _rates(hosts: pd.DataFrame) -> list[Series]:
    """Bytes a second of all interfaces and RDMA ports, from counters; a counter that went back gives no rate."""
    lines = []
    for node, rows in hosts.groupby("node"):
        ordered = rows.sort_values("time")
        columns = ["net_rx_bytes", "net_tx_bytes", "rdma_rx_bytes", "rdma_tx_bytes"]
        total = ordered[columns].sum(axis=1, min_count=1).to_numpy(np.float64)
        at = ordered["time"].to_numpy(np.float64)
        if len(at) < 2:
            continue
        rate = np.diff(total) / np.maximum(np.diff(at), 1e-9) / GB
        lines.append(Series(str(node), at[1:], np.where(rate >= 0, rate, np.nan)))
    return lines
