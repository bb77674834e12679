"""Charts of a run beside the one that its config names (``compare_with``). Figures are against.py's."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.against import differences
from toolkit.analysis.charts.registry import NotAsked, chart
from toolkit.analysis.charts.several import compare_figure
from toolkit.analysis.load import Run


@chart(
    "against",
    "Change of each figure from the run that this one is compared with (A) to this one (B), at each concurrency that "
    "both have, with 95 % intervals; right of zero is larger. Filled: the interval leaves zero out; hollow: the same "
    "within the noise of one run. For latencies larger is worse, for throughput better.",
)
def against_chart(run: Run) -> Figure:
    if run.baseline is None:
        raise NotAsked("no run to compare with was named")
    return compare_figure(differences(run), run.baseline.name, run.name)


@chart(
    "balance_against",
    "Balancedness of the ranks' expert load (mean / busiest; 1 is even) in each recorder window of both runs, over the "
    "share of the assignments made so far, so that runs of unlike length lie above each other. Thin: windows, which "
    "are uneven by chance when they are small; thick: their weighted mean. With rebalancing B should climb and stay.",
)
def balance_against(run: Run) -> Figure:
    if run.baseline is None:
        raise NotAsked("no run to compare with was named")
    fig = style.figure("Expert balance of both runs", f"A: {run.baseline.name}   B: {run.name}")
    ax = fig.subplots()
    for name, side, look in (("A", run.baseline, style.LINES[1]), ("B", run, style.LINES[0])):
        _line(ax, side, f"{name}: {side.name}", look["color"])
    style.axes(ax, "(token, expert) assignments so far (%)", "balancedness (mean / busiest rank)")
    ax.set_ylim(0, 1.03)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return fig


def _line(ax: Axes, run: Run, label: str, color: str) -> None:
    windows = run.windows
    if windows is None:
        raise ValueError(f"{run.name} has no expert counts")
    even, weight = windows.balancedness(), windows.loads_WLG.sum((1, 2))
    known = np.isfinite(even) & (weight > 0)
    even, weight = even[known], weight[known]
    at = 100 * (weight.cumsum() - weight / 2) / weight.sum()
    ax.plot(at, even, color=color, linewidth=0.6, alpha=0.35)
    groups = [group for group in np.array_split(np.arange(len(at)), min(40, max(len(at), 1))) if len(group)]
    mean = [float(np.average(even[group], weights=weight[group])) for group in groups]
    ax.plot([float(at[group].mean()) for group in groups], mean, color=color, linewidth=2.0, label=label)
