"""The timeline of a run. Bins come from toolkit/analysis/timeline.py."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.load import Run
from toolkit.analysis.timeline import Timeline, timeline


@chart(
    "timeline",
    "The run over time, in equal bins. Load points are separated by lines and named at the top; shaded is the steady "
    "state that throughput is taken from, before it the ramp-up, after it the tail. Look for: requests in flight that "
    "never reach the concurrency (the client or its cap is the limit); tok/s that drifts inside the shading; ranks "
    "whose running batch differs (uneven routing); KV use near 100 % with preemptions (too little cache); errors in "
    "bursts.",
)
def draw_timeline(run: Run) -> Figure:
    data = timeline(run)
    at = data.edges[:-1] - data.edges[0] + data.bin_s / 2
    fig = style.figure(f"Timeline, bins of {data.bin_s:.3g} s", run.name, width=10, height=8.4)
    flight, tokens, running, cache = panels = fig.subplots(4, 1, sharex=True)
    flight.plot(at, data.in_flight, color=style.BLUE, linewidth=1.3)
    style.axes(flight, "", "requests\nin flight")
    tokens.plot(at, data.output_tok_s, color=style.BLUE, linewidth=1.3)
    style.axes(tokens, "", "output\ntok/s")
    _ranks(running, at, data)
    style.axes(running, "", "running batch\n(requests)")
    cache.plot(at, 100 * data.kv_share, color=style.BLUE, linewidth=1.3, label="KV use, fullest rank (%)")
    style.axes(cache, "seconds since the first request", "KV use (%)")
    cache.set_ylim(0, 105)
    _events(cache, at, data)
    for ax in (flight, tokens, running):
        ax.set_ylim(bottom=0)
    for ax in panels:
        for phase in data.phases:
            if np.isfinite(phase.steady[0]):
                begin, end = (moment - data.edges[0] for moment in phase.steady)
                ax.axvspan(begin, end, color=style.BLUE, alpha=0.08, linewidth=0)
    zero = data.edges[0]
    style.spans(list(panels), [(phase.begin - zero, phase.end - zero, f"{phase.concurrency}") for phase in data.phases])
    flight.set_xlim(0, data.edges[-1] - data.edges[0])
    return fig


def _ranks(ax: Axes, at: np.ndarray, data: Timeline) -> None:
    """A line a rank while lines can be told apart, or else the range over ranks."""
    if not len(data.running):
        ax.text(0.5, 0.5, "no step log", ha="center", va="center", transform=ax.transAxes, fontsize=9)
        return
    if len(data.running) <= 8:
        for rank, (row, color) in enumerate(zip(data.running, style.ramp(len(data.running)), strict=True)):
            ax.plot(at, row, linewidth=1.1, color=color, label=f"DP {rank}")
        ax.legend(fontsize=7, frameon=False, ncols=8, loc="upper left")
        return
    seen = np.isfinite(data.running).any(0)
    low, middle, high = (np.full(len(at), np.nan) for _ in range(3))
    low[seen], middle[seen], high[seen] = np.nanpercentile(data.running[:, seen], (0, 50, 100), axis=0)
    ax.fill_between(at, low, high, color=style.BLUE, alpha=0.2, linewidth=0, label="smallest to largest DP rank")
    ax.plot(at, middle, color=style.BLUE, linewidth=1.2, label="median DP rank")
    ax.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")


def _events(ax: Axes, at: np.ndarray, data: Timeline) -> None:
    """Preemptions and ends without success as marks, with their totals: a bar of one would not be seen."""
    for height, counts, what, line in (
        (4, data.preemptions, "preemptions", style.LINES[1]),
        (12, data.failures, "failed", style.LINES[2]),
        (20, data.given_up, "given up by the client", style.LINES[0] | {"color": style.MUTED}),
    ):
        some = counts > 0
        if some.any():
            ax.scatter(at[some], np.full(some.sum(), height), s=18, marker=line["marker"],
                       color=line["color"], label=f"{what}: {int(counts.sum())}", zorder=3)  # fmt: skip
    ax.legend(fontsize=7, frameon=False, ncols=4, loc="upper left")
