"""A run against the one that its config names (``compare_with``): the figures at each load, and the expert balance.

Latencies, throughput and their intervals are compare.py's. Read next: ``charts/against.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from toolkit.analysis.compare import compare
from toolkit.analysis.findings import number
from toolkit.analysis.load import Run

SHOWN = ("ttft_p50_ms", "ttft_p99_ms", "itl_mean_ms", "tpot_p50_ms", "tpot_p99_ms", "e2e_p50_ms", "output_tok_s")
TITLES = ["conc.", "figure", "A", "B", "B - A", "95 % interval", "change", "verdict"]


def differences(run: Run) -> pd.DataFrame:
    """``compare`` of the baseline (A) with ``run`` (B), and a row of balancedness for each load that both have.

    Raises:
        ValueError: there is no baseline, or the two share no load.
    """
    if run.baseline is None:
        raise ValueError("there is no run to compare with")
    found = compare(run.baseline, run)
    rows = []
    for concurrency in sorted(found["concurrency"].unique()):
        a, b = (_balancedness(side, concurrency) for side in (run.baseline, run))
        if math.isfinite(a) and math.isfinite(b):
            row: dict[str, Any] = dict.fromkeys(found.columns, math.nan)
            row |= {"concurrency": concurrency, "figure": "balancedness_mean", "a": a, "b": b, "difference": b - a,
                    "change": b / a - 1, "verdict": "higher" if b > a else "lower"}  # fmt: skip
            rows.append(row)
    return pd.concat([found, pd.DataFrame(rows)], ignore_index=True) if rows else found


def table(run: Run) -> list[list[str]]:
    """Rows for the report, under ``TITLES``; none where there is nothing to compare with."""
    try:
        found = differences(run)
    except ValueError:
        return []
    shown = found[found["figure"].isin([*SHOWN, "balancedness_mean"])].sort_values("concurrency", kind="stable")
    return [_cells(row) for row in shown.to_dict("records")]


def _cells(row: dict[Any, Any]) -> list[str]:
    interval = f"{number(row['low'])} to {number(row['high'])}" if math.isfinite(row["low"]) else "–"
    return [f"{row['concurrency']:g}", str(row["figure"]), number(row["a"]), number(row["b"]),
            number(row["difference"]), interval, f"{row['change']:+.1%}", str(row["verdict"])]  # fmt: skip


def _balancedness(run: Run, concurrency: int) -> float:
    """Mean over the load points of this concurrency."""
    loads = [load for point, load in zip(run.points, run.point_loads) if point.concurrency == concurrency]
    known = [load.balancedness_mean for load in loads if load is not None and math.isfinite(load.balancedness_mean)]
    return sum(known) / len(known) if known else math.nan
