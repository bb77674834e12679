"""How long a sweep takes at the least, to hold against a job's time limit before a node is taken. Pure.

A lower bound, because it may refuse a run: engines are taken to be fast (``TPOT_S``, no queueing, no time to first
token) and weights to come at a good disk's rate. What is open-ended (a search, a replayed trace) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from toolkit.config.experiment import ExpConfig
from toolkit.launch.pools import worker_pools

TPOT_S = {"cuda": 0.008, "cpu": 0.01}  # faster than the fastest published wide-EP decode under load, or a tiny model
READ_BYTES_S = 4e9  # a rank, from a shared disk
START_S = {"cuda": 30.0, "cpu": 5.0}  # processes, process groups, warm-up


@dataclass(frozen=True)
class Estimate:
    """Seconds."""

    start: float
    points: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.start + sum(self.points)


def at_least(cfg: ExpConfig, weight_bytes: int) -> Estimate:
    """The shortest that a run of ``cfg`` can take whose ranks each read ``weight_bytes``."""
    from toolkit.loadgen.points import points_of

    load, tpot = cfg.load, TPOT_S[cfg.cluster.device]
    times = []
    for point in points_of(load):
        calls = point.warmup + point.measured
        if point.request_rate > 0:
            times.append(calls / point.request_rate)
        elif not point.open_loop:
            pool = worker_pools(cfg)[-1]  # what generates
            slots = pool.workers * pool.parallel.dp_size * pool.engine.max_running_requests
            waves = math.ceil(calls / min(point.concurrency, slots))
            times.append(waves * load.osl * tpot)
    return Estimate(START_S[cfg.cluster.device] + weight_bytes / READ_BYTES_S, tuple(times))


def text(seconds: float) -> str:
    """``95 s``, ``42 min``, ``3.5 h``"""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
