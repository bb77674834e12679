"""Charts of latency: against the load, and as distributions. Registered by name; figures come from metrics.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.levels import run_levels
from toolkit.analysis.load import Run
from toolkit.analysis.metrics import e2e_s, itl_s, succeeded, tpot_s, ttft_s

TITLES = {
    "ttft": "TTFT: send to first token",
    "itl": "ITL: gap between tokens",
    "tpot": "TPOT: mean of a request",
    "e2e": "E2E: send to last token",
}
FIGURES: dict[str, Callable[[pd.DataFrame], NDArray[np.float64]]] = {
    "ttft": ttft_s, "itl": itl_s, "tpot": tpot_s, "e2e": e2e_s,
}  # fmt: skip


@chart(
    "latency_vs_concurrency",
    "Latency as the load grows: time to first token, gap between tokens, mean time per output token of a request, and "
    "the whole answer; median, 90th and 99th percentile of the requests that succeeded, the band between median and "
    "p90 shaded. TTFT that climbs while TPOT stays flat is queueing or prefill; TPOT that climbs is a slower decode "
    "step; a p99 far above the p50 is an uneven service. Bars span the repeats of a load point, where it has any. "
    "With fewer than 100 requests in a point, p99 is close to the slowest request.",
)
def latency_vs_concurrency(run: Run) -> Figure:
    levels = run_levels(run)
    levels = levels[levels["e2e_p50_ms"].notna()] if len(levels) else levels
    if levels.empty:
        raise ValueError("no load point has a request that succeeded")
    fig = style.figure("Latency against concurrency", run.name, height=6.2)
    for ax, (metric, title) in zip(fig.subplots(2, 2).flat, TITLES.items(), strict=True):
        columns = [f"{metric}_{stat}_ms" for stat in ("p50", "p90", "p99")]
        ax.fill_between(levels["concurrency"], levels[columns[0]], levels[columns[1]], color=style.BLUE, alpha=0.12)
        for column, line in zip(columns, style.LINES, strict=True):
            ax.plot(levels["concurrency"], levels[column], label=column.split("_")[1], markersize=5, linewidth=1.6,
                    **line)  # fmt: skip
            _repeats(ax, levels, column, line["color"])
        style.axes(ax, "concurrency (requests in flight)", "ms", title)
        style.concurrency_axis(ax, levels["concurrency"].tolist())
        style.latency_axis(ax, levels[columns].to_numpy(np.float64))
    fig.axes[0].legend(fontsize=8, frameon=False)
    return fig


def _repeats(ax: Axes, levels: pd.DataFrame, column: str, color: str) -> None:
    """A bar from the smallest to the largest of the repeats."""
    if f"{column}_low" not in levels:
        return
    known = levels[levels[f"{column}_low"].notna()]
    if len(known):
        ax.vlines(known["concurrency"], known[f"{column}_low"], known[f"{column}_high"], color=color, linewidth=3,
                  alpha=0.45)  # fmt: skip


@chart(
    "latency_distributions",
    "Share of the requests (ITL: of the tokens) at or below each latency, one curve a load point. A steep curve is an "
    "even service. A step or a long tail to the right of ITL are tokens held up: by prefill of other requests in the "
    "same step, by a rank that others wait for, or by preemption. Tokens that share a chunk share its gap. Curves that "
    "move right together are a slower server; curves that only lean are a few slow requests.",
)
def latency_distributions(run: Run) -> Figure:
    points = [(point.concurrency, succeeded(point.requests)) for point in run.points]
    points = [(concurrency, rows) for concurrency, rows in points if len(rows)]
    if not points:
        raise ValueError("no load point has a request that succeeded")
    fig = style.figure("Distribution of latency", run.name, height=6.4)
    colors = style.ramp(len(points))
    for ax, (metric, title) in zip(fig.subplots(2, 2).flat, TITLES.items(), strict=True):
        drawn = [
            _ecdf(ax, FIGURES[metric](rows) * 1e3, color, f"concurrency {concurrency}")
            for (concurrency, rows), color in zip(points, colors, strict=True)
        ]
        style.axes(ax, "ms, log scale", "at or below (%)", title)
        for percent in (50, 90, 99):
            ax.axhline(percent, color=style.MUTED, linewidth=0.7, linestyle=":")
        ax.set_ylim(0, 101)
        ax.set_yticks([0, 25, 50, 75, 90, 99])
        if any(drawn):
            ax.set_xscale("log")
            style.plain_numbers(ax.xaxis)
        else:
            ax.text(0.5, 0.5, "one token, or one chunk, a request", ha="center", transform=ax.transAxes, fontsize=9)
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, frameon=False, loc="outside right upper")
    return fig


def _ecdf(ax: Axes, values: NDArray[np.float64], color: object, label: str) -> bool:
    values = np.sort(values[np.isfinite(values)])
    share = np.arange(1, len(values) + 1) / max(len(values), 1)
    keep = np.unique(np.linspace(0, len(values) - 1, 1500).astype(np.int64)) if len(values) else np.empty(0, np.int64)
    keep = keep[values[keep] > 0]  # more points than pixels show nothing; a log axis has no zero
    ax.step(values[keep], share[keep] * 100, where="post", color=color, linewidth=1.7, label=label)
    return len(keep) > 0
