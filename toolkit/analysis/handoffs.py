"""Handoffs of disaggregated serving, load point by load point: where the time to the first token goes, and KV rates.

Figures of ``transfers/*.arrows`` (``steps.TransferRecord``). A request belongs to the load point in whose measured
time it joined its decode worker. Reads no other file. Read next: ``charts/handoffs.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from toolkit.analysis.metrics import interval

if TYPE_CHECKING:
    from toolkit.analysis.load import Run

# The time to the first token in the order in which it passes; the sum of their means is the mean of the whole.
PHASES: tuple[tuple[str, str], ...] = (
    ("queue", "queue: before its first step on the prefill rank"),
    ("prefill", "prefill: to its first token"),
    ("wait", "wait: before the read begins"),
    ("transfer", "transfer: the part that prefill does not hide"),
    ("join", "join: the rest of a decode step"),
)


def phases(transfers: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each phase of each request, and ``first_decode``, which comes after the first token."""
    exposed = transfers["transfer_s"] - transfers["hidden_s"]
    return pd.DataFrame(
        {
            "queue": transfers["prefill_queue_s"],
            "prefill": transfers["prefill_s"],
            "wait": transfers["wait_s"],
            "transfer": exposed.clip(lower=0),
            "join": transfers["join_s"],
            "first_decode": transfers["first_decode_s"],
        }
    )


def by_point(run: Run) -> pd.DataFrame:
    """A row a load point that has handoffs.

    Columns: ``concurrency``, ``requests``, the mean seconds of each phase and of ``first_decode``, ``transfer_ms_p50``,
    ``transfer_ms_p99``, ``gb_s`` (bytes of a rank's share over the time of its reads, median over requests),
    ``hidden`` (share of the reads' time beside prefill), ``exposed`` (share of the time to the first token that is
    transfer and not hidden: the most that sending each layer as it is computed could save), ``mb`` (bytes of a request
    on one rank, mean).

    Raises:
        ValueError: serving is aggregated, or nothing was handed on while a point was measured.
    """
    if run.transfers.empty:
        raise ValueError("no KV was handed from worker to worker: serving is aggregated")
    rows = []
    for point in run.points:
        begin, end = interval(point.requests)
        within = run.transfers[(run.transfers["t_join"] >= begin) & (run.transfers["t_join"] <= end)]
        if len(within):
            rows.append({"concurrency": point.concurrency, **_figures(within)})
    if not rows:
        raise ValueError("no load point has handoffs in its measured time")
    return pd.DataFrame(rows)


def _figures(rows: pd.DataFrame) -> dict[str, float]:
    seconds = rows["transfer_s"].to_numpy(np.float64)
    means: Sequence[tuple[str, float]] = [(str(k), float(v)) for k, v in phases(rows).mean().items()]
    total, found = seconds.sum(), dict(means)
    return {
        "requests": len(rows),
        **found,
        "transfer_ms_p50": 1e3 * float(np.percentile(seconds, 50)),
        "transfer_ms_p99": 1e3 * float(np.percentile(seconds, 99)),
        "gb_s": float(np.median(rows["bytes"] / np.maximum(seconds, 1e-9))) / 1e9,
        "hidden": float(rows["hidden_s"].sum() / total) if total else 0.0,
        "exposed": found["transfer"] / max(sum(found[name] for name, _ in PHASES), 1e-9),
        "mb": float(rows["bytes"].mean()) / 1e6,
    }
