"""Load levels: repeats of a load point put together, in one run or over runs of the same settings.

Owns how repeats are combined and their spread. Figures of one point are metrics.py's.
Read next: runs.py, charts/latency.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from toolkit.analysis.load import Run
from toolkit.analysis.metrics import e2e_s, itl_s, succeeded, summary_ms, tpot_s, ttft_s
from toolkit.analysis.sweep_table import LoadPoint
from toolkit.records.sweep import SWEEP_TEXTS

RATES = ("output_tok_s", "output_tok_s_per_gpu", "output_tok_s_per_user", "total_tok_s", "steady_output_tok_s")
AVERAGED = (*RATES, "power_w", "output_tok_s_per_w", "isl_mean", "osl_mean", "balancedness_mean")
SPREAD = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "e2e_p50_ms",
          "e2e_p99_ms", "output_tok_s", "output_tok_s_per_gpu", "output_tok_s_per_user")  # fmt: skip


def combine(points: Iterable[LoadPoint]) -> pd.DataFrame:
    """One row a concurrency, ascending: the columns of ``sweep.csv``, ``repeats``, and the spread of repeats.

    Latencies are those of all repeats' requests pooled; rates and means are averaged over repeats, counts and times
    added, ``imbalance_max`` is the largest. ``<figure>_low`` and ``<figure>_high`` are the smallest and largest of
    the repeats (NaN without repeats): the spread that no interval computed inside one run can know.
    """
    groups: dict[int, list[LoadPoint]] = {}
    for point in points:
        groups.setdefault(point.concurrency, []).append(point)
    return pd.DataFrame([_level(groups[concurrency]) for concurrency in sorted(groups)])


def run_levels(run: Run) -> pd.DataFrame:
    """Of the points that are valid: figures of the others are not what they are taken for."""
    return combine(point for point in run.points if point.valid)


def steady_per_gpu(levels: pd.DataFrame) -> pd.DataFrame:
    """Of rows with the columns of ``sweep.csv``: ``tok_s_per_gpu``, in the steady state; where there is none
    (``steady`` is false) of the whole point, with its start and tail."""
    steady, gpus = levels["steady_output_tok_s"].notna(), levels["output_tok_s"] / levels["output_tok_s_per_gpu"]
    rates = (levels["steady_output_tok_s"] / gpus).where(steady, levels["output_tok_s_per_gpu"])
    return pd.DataFrame({"tok_s_per_gpu": rates, "steady": steady})


def _level(points: list[LoadPoint]) -> dict[str, float]:
    rows = pd.DataFrame([point.row for point in points]).drop(columns=[*SWEEP_TEXTS, "repeat"], errors="ignore")
    level: dict[str, float] = {str(name): float(rows[name].iloc[0]) for name in rows}
    level["repeats"] = len(points)
    spread = {f"{name}_{side}": np.nan for name in SPREAD for side in ("low", "high")}
    if len(points) > 1:
        for name in ("requests", "failed", "cancelled", "duration_s", "steady_s"):
            level[name] = float(rows[name].sum())
        for name in AVERAGED:
            level[name] = float(rows[name].mean())
        level["imbalance_max"] = float(rows["imbalance_max"].max())
        level |= _pooled([point.requests for point in points])
        for name in SPREAD:
            spread[f"{name}_low"], spread[f"{name}_high"] = float(rows[name].min()), float(rows[name].max())
    return level | spread


def _pooled(requests: list[pd.DataFrame]) -> dict[str, float]:
    ok = [succeeded(rows) for rows in requests]
    figures = {"ttft": ttft_s, "itl": itl_s, "tpot": tpot_s, "e2e": e2e_s}
    return {
        f"{name}_{stat}_ms": value
        for name, figure in figures.items()
        for stat, value in summary_ms(np.concatenate([figure(rows) for rows in ok])).items()
    }
