"""Two runs side by side: the difference of each figure at each load they share, with its confidence interval.

Owns which figures are compared and what is said of a difference. Definitions are metrics.py's, intervals stats.py's.
Read next: charts/compare.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from toolkit.analysis.load import Run
from toolkit.analysis.metrics import e2e_s, interval, itl_by_request_s, succeeded, tokens_at, tpot_s, ttft_s
from toolkit.analysis.stats import Draws, mean, percentile, ratio_of_sums
from toolkit.analysis.steady import steady_interval

Floats = NDArray[np.float64]

BLOCKS = 24  # stretches of time that throughput is resampled over
COLUMNS = ("concurrency", "figure", "a", "b", "difference", "low", "high", "change", "change_low", "change_high",
           "verdict")  # fmt: skip


def compare(a: Run, b: Run) -> pd.DataFrame:
    """One row a (concurrency that both have, figure), columns ``COLUMNS``; difference is b - a, change b / a - 1.

    ``low`` and ``high`` bound the difference, 95 %; ``verdict`` is ``higher`` or ``lower`` where they leave zero out,
    ``same within noise`` where not, ``unknown`` without an interval. Repeats of a point are pooled. The intervals hold
    what is random within the two runs; what differs from run to run (placement, neighbours, temperature) only repeats
    show.

    Raises:
        ValueError: the runs share no concurrency.
    """
    left, right = _by_concurrency(a), _by_concurrency(b)
    shared = sorted(set(left) & set(right))
    if not shared:
        raise ValueError(
            f"{a.name} (concurrency {sorted(left)}) and {b.name} ({sorted(right)}) share no load: "
            "run one of them with load.concurrency of the other"
        )
    rows = []
    for concurrency in shared:
        ours, theirs = (figures(side[concurrency], concurrency, seed) for seed, side in enumerate((left, right)))
        rows += [_row(concurrency, name, ours[name], theirs[name]) for name in ours]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def figures(points: list[pd.DataFrame], concurrency: int, seed: int) -> dict[str, Draws]:
    """Name (as in sweep.csv) -> figure with its resamples; ``points`` are the requests of each repeat."""
    ok = [succeeded(rows) for rows in points]

    def pooled(figure: Callable[[pd.DataFrame], Floats]) -> Floats:
        return np.concatenate([figure(rows) for rows in ok]) * 1e3

    found: dict[str, Draws] = {}
    per_request = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
    for name, figure in per_request.items():
        values = pooled(figure)
        found[f"{name}_mean_ms"] = mean(values, seed)
        for percent in (50, 90, 99):
            found[f"{name}_p{percent}_ms"] = percentile(values, percent, seed)
    gaps = [itl_by_request_s(rows) for rows in ok]  # tokens of a request are alike: requests are resampled
    found["itl_mean_ms"] = ratio_of_sums(
        np.concatenate([seconds for seconds, _ in gaps]) * 1e3,
        np.concatenate([count for _, count in gaps]).astype(np.float64),
        seed,
    )
    found["output_tok_s"] = mean(np.concatenate([_throughput(rows, concurrency) for rows in points]), seed)
    return found


def _throughput(requests: pd.DataFrame, concurrency: int) -> Floats:
    """Output tok/s in equal stretches of the steady state, or of all of the point where it has none."""
    begin, end = steady_interval(requests, concurrency)
    if np.isnan(begin):
        begin, end = interval(requests)
    if not end > begin:
        return np.empty(0)
    times, tokens = tokens_at(requests[requests["status"] == "ok"])
    counted, edges = np.histogram(times, np.linspace(begin, end, BLOCKS + 1), weights=tokens)
    per_second: Floats = counted / np.diff(edges)
    return per_second


def _by_concurrency(run: Run) -> dict[int, list[pd.DataFrame]]:
    found: dict[int, list[pd.DataFrame]] = {}
    for point in run.points:
        if point.valid and len(succeeded(point.requests)):
            found.setdefault(point.concurrency, []).append(point.requests)
    return found


def _row(concurrency: int, name: str, a: Draws, b: Draws) -> dict[str, object]:
    difference, change = b.minus(a), b.ratio(a)
    verdict = "same within noise"
    if not np.isfinite(difference.low):
        verdict = "unknown"
    elif difference.low > 0:
        verdict = "higher"
    elif difference.high < 0:
        verdict = "lower"
    values = (concurrency, name, a.value, b.value, difference.value, difference.low, difference.high, change.value,
              change.low, change.high, verdict)  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))
