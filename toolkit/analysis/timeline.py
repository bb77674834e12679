"""A run over time: what was in flight, what came out, what the ranks did, bin by bin.

Owns the bins and the phases (ramp-up, steady state, tail) that the timeline chart marks. Latency definitions are
metrics.py's. Read next: charts/timeline.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from toolkit.analysis.load import Run
from toolkit.analysis.metrics import tokens_at
from toolkit.analysis.steady import ended, in_flight, steady_interval
from toolkit.records.requests import NOT_FAILED

Floats = NDArray[np.float64]

HOLD_S = 1.0  # for how long the state after a pass is taken to hold while no other pass begins


@dataclass(frozen=True)
class Phase:
    """A load point on the clock, Unix seconds: all of it, and its steady state (NaN: none)."""

    concurrency: int
    begin: float
    end: float
    steady: tuple[float, float]


@dataclass(frozen=True)
class Timeline:
    """Figures of equal bins.

    Attributes:
        edges: Unix seconds, [bins + 1].
        in_flight: time-weighted mean of the requests in flight, [bins].
        output_tok_s: output tokens of all requests that came in the bin, per second.
        failures: requests that failed in the bin.
        given_up: requests that the client ended in the bin: as asked, or with a point that was cut off.
        running: mean running batch of each DP rank, [ranks, bins]; NaN where it made no pass.
        kv_share: largest KV use of any DP rank, 0 to 1; NaN where none made a pass.
        preemptions: requests pushed out in the bin, all ranks.
    """

    edges: Floats
    in_flight: Floats
    output_tok_s: Floats
    failures: NDArray[np.int64]
    given_up: NDArray[np.int64]
    running: Floats
    kv_share: Floats
    preemptions: NDArray[np.int64]
    phases: list[Phase]

    @property
    def bin_s(self) -> float:
        return float(self.edges[1] - self.edges[0])


def phases(run: Run) -> list[Phase]:
    """The load points that sent something."""
    return [
        Phase(
            point.concurrency,
            float(point.requests["t_send"].min()),
            float(ended(point.requests).max()),
            steady_interval(point.requests, point.concurrency),
        )
        for point in run.points
        if len(point.requests)
    ]


def timeline(run: Run, bins: int = 240) -> Timeline:
    """The whole run in ``bins`` bins.

    Raises:
        ValueError: no request was recorded.
    """
    requests = run.requests
    if requests.empty:
        raise ValueError("no request was recorded")
    begin, end = float(requests["t_send"].min()), float(ended(requests).max())
    if not end > begin:
        raise ValueError("all requests were sent and ended in the same instant")
    edges = np.linspace(begin, end, bins + 1).astype(np.float64)
    times, tokens = tokens_at(requests)
    over, status = ended(requests), requests["status"]
    steps = run.steps
    # np.minimum: the last edge belongs to the last bin
    place = np.minimum(np.searchsorted(edges, steps["t_begin"].to_numpy(np.float64), "right") - 1, bins - 1)
    hold = int(HOLD_S / (edges[1] - edges[0]))
    steps = steps.assign(bin=place)[(place >= 0) & (steps["t_begin"].to_numpy() <= end)]
    return Timeline(
        edges=edges,
        in_flight=_mean_level(*in_flight(requests), edges),
        output_tok_s=np.asarray(np.histogram(times, edges, weights=tokens)[0] / (edges[1] - edges[0]), np.float64),
        failures=np.histogram(over[~status.isin(NOT_FAILED)], edges)[0],
        given_up=np.histogram(over[status.isin(("cancelled", "interrupted"))], edges)[0],
        running=_running(steps, bins, hold),
        kv_share=_per_bin((steps["kv_used_tokens"] / steps["kv_total_tokens"]).groupby(steps["bin"]).max(), bins, hold),
        preemptions=np.bincount(steps["bin"], weights=steps["preemptions"], minlength=bins).astype(np.int64)
        if len(steps)
        else np.zeros(bins, np.int64),
        phases=phases(run),
    )


def _running(steps: pd.DataFrame, bins: int, hold: int) -> Floats:
    ranks = sorted(steps["dp_rank"].unique())
    mean = steps.groupby(["dp_rank", "bin"])["running"].mean()
    return np.stack([_per_bin(mean[rank], bins, hold) for rank in ranks]) if ranks else np.empty((0, bins))


def _per_bin(values: pd.Series[float], bins: int, hold: int) -> Floats:
    """One value a bin; a pass that outlasts its bin holds for the next ones."""
    filled = values.reindex(range(bins))
    return np.asarray(filled.ffill(limit=hold) if hold else filled, np.float64)


def _mean_level(times: Floats, level: NDArray[np.int64], edges: Floats) -> Floats:
    """Time-weighted mean of a step function in each bin: the difference of its integral at the edges."""
    area = np.concatenate([[0.0], np.cumsum(np.diff(times) * level[:-1])])
    at = np.asarray(np.interp(edges, times, area), np.float64)
    return np.asarray(np.diff(at) / np.diff(edges), np.float64)
