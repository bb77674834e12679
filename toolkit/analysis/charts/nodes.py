"""The machines of a run against time. Figures come from toolkit/analysis/nodes.py."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.load import Run
from toolkit.analysis.nodes import Panel, Series, panels
from toolkit.analysis.timeline import phases

GAP = 10  # times the usual distance of two samples, from which on no line joins them
FEW = 8  # nodes that get a line each; more are shown as their range


@chart(
    "nodes",
    "What the machines did, a line a node (of many nodes: from the lowest to the highest, and the median). Load points "
    "are shaded in turn and named at the top. Look for: a node whose power or clock lies below the others (a "
    "throttled or badly cooled GPU holds every rank back); clocks that fall while the load stays (heat, power cap); "
    "CPUs near 100 % (frontend, tokenizer or CPU ranks are the limit); memory that only grows.",
)
def draw_nodes(run: Run) -> Figure:
    if run.nodes.empty:
        raise ValueError("no node was sampled (health.sample_interval_s)")
    shown = panels(run.nodes)
    if not shown:
        raise ValueError("the samples of the nodes hold no figure")
    points = phases(run)
    zero = min([point.begin for point in points], default=float(run.nodes["time"].min()))
    fig = style.figure("Nodes", run.name, width=10, height=1.2 + 1.75 * len(shown))
    columns = np.atleast_1d(fig.subplots(len(shown), 1, sharex=True))
    for ax, panel in zip(columns, shown, strict=True):
        _draw(ax, panel, zero)
        style.axes(ax, "", panel.label.replace(" (", "\n("))
        for index, point in enumerate(points):
            shade = 0.10 if index % 2 == 0 else 0.04
            ax.axvspan(point.begin - zero, point.end - zero, color=style.BLUE, alpha=shade, linewidth=0)
    for point in points:
        middle = (point.begin + point.end) / 2 - zero
        columns[0].annotate(f"{point.concurrency}", (middle, 1.0), xycoords=("data", "axes fraction"), ha="center",
                            xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    columns[-1].set_xlabel("seconds since the first request", fontsize=9)
    if 1 < len(shown[0].lines) <= FEW:
        columns[0].legend(fontsize=7, frameon=False, ncols=FEW, loc="lower left")
    return fig


def _broken(line: Series) -> np.ndarray:
    """The values with a hole where samples are missing, as between two attempts at a run."""
    gaps = np.diff(line.time, prepend=line.time[:1])
    value = line.value.copy()
    value[gaps > GAP * max(float(np.median(gaps)), 1e-9)] = np.nan
    return value


def _draw(ax: Axes, panel: Panel, zero: float) -> None:
    lines = panel.lines
    if len(lines) <= FEW:
        colors = style.ramp(len(lines)) if len(lines) > 1 else [style.BLUE]
        for line, color in zip(lines, colors, strict=True):
            ax.plot(line.time - zero, _broken(line), color=color, linewidth=1.2, label=line.node)
    else:
        at = np.unique(np.concatenate([line.time for line in lines]))[:: len(lines)]
        table = np.stack([np.interp(at, line.time, line.value, np.nan, np.nan) for line in lines])
        known = np.isfinite(table).any(0)
        low, middle, high = np.nanpercentile(table[:, known], (0, 50, 100), axis=0)
        ax.fill_between(at[known] - zero, low, high, color=style.BLUE, alpha=0.2, linewidth=0)
        ax.plot(at[known] - zero, middle, color=style.BLUE, linewidth=1.2)
    top = max((float(np.nanmax(line.value)) for line in lines if np.isfinite(line.value).any()), default=1.0)
    if "clock" not in panel.label:
        ax.set_ylim(0, max(1.08 * top, 1e-6))
