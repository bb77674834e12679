"""The look that all charts share: colours, axes, figure sizes.

Owns only appearance; knows nothing of runs. Uses matplotlib's Figure objects, never pyplot, so that nothing global
is changed and drawing works in any thread and without a display.
Read next: charts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

DPI = 130
INK, MUTED, GRID = "#222222", "#666666", "#dddddd"
# Okabe and Ito's colours, told apart by every kind of colour vision; marker and dash repeat the message in grey.
BLUE, ORANGE, RED = "#0072B2", "#E69F00", "#D55E00"
LINES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": ORANGE, "marker": "s", "linestyle": "--"},
    {"color": RED, "marker": "^", "linestyle": ":"},
)
SERIES: tuple[dict[str, Any], ...] = (
    *LINES,
    {"color": "#009E73", "marker": "D", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": INK, "marker": "X", "linestyle": ":"},
    {"color": "#999999", "marker": ".", "linestyle": "-"},
)
# Below the mean, the mean (in the middle), and above it.
LOAD_COLORS = ((0.0, "#6aaed6"), (0.5, "#fafafa"), (0.7, "#f4a582"), (0.88, "#b2182b"), (1.0, "#4d0010"))


def figure(title: str, source: str, width: float = 9.0, height: float = 4.8) -> Figure:
    """An empty figure with ``title`` above and ``source`` (the run's name) small below; inches."""
    fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    fig.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    fig.supxlabel(source, fontsize=7, color=MUTED, x=0.995, ha="right", parse_math=False)
    return fig


def axes(ax: Axes, xlabel: str, ylabel: str, title: str = "") -> None:
    """Labels with units, light grid, two spines."""
    ax.set_xlabel(xlabel, fontsize=9, color=INK)
    ax.set_ylabel(ylabel, fontsize=9, color=INK)
    if title:
        ax.set_title(title, fontsize=10, loc="left", color=INK)
    ax.tick_params(labelsize=8, colors=MUTED, labelcolor=INK)
    ax.grid(True, color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)


def concurrency_axis(ax: Axes, values: Sequence[int]) -> None:
    """A log axis whose ticks are the load points themselves."""
    ticks = sorted(set(values))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks[:: max(1, -(-len(ticks) // 12))])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)


def latency_axis(ax: Axes, values: NDArray[np.float64]) -> None:
    """From zero; logarithmic where the values span more than a factor of 30."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)
    else:
        ax.set_ylim(0, 1.08 * positive.max() if len(positive) else 1)


def spans(panels: Sequence[Axes], named: Sequence[tuple[float, float, str]]) -> None:
    """Stretches of a shared x axis (begin, end, name): a line where each begins, its name above the first panel."""
    for begin, end, name in named:
        for ax in panels:
            ax.axvline(begin, color=MUTED, linewidth=0.7)
        panels[0].annotate(name, ((begin + end) / 2, 1.0), xycoords=("data", "axes fraction"), ha="center",
                           xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip


def plain_numbers(axis: Any) -> None:
    """50 and 2000 instead of 10^1.7 on a log axis, at 1, 2, 3 and 5 of each decade."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def ramp(count: int) -> list[Any]:
    """``count`` ordered colours, light to dark, that stay ordered in grey."""
    return [mpl.colormaps["viridis_r"](x) for x in np.linspace(0.15, 0.95, count)]


def ratio_heatmap(
    fig: Figure, ax: Axes, ratio: NDArray[np.float64], rows: Sequence[int], what: str, top: float = 0.0
) -> None:
    """Cells of load / mean, linear: white is the mean, red above it, pale blue below, grey where nothing is known.

    Blue stays pale so that the eye finds what is overloaded. Above 8 times the mean the colour does not change.

    Args:
        what: label of the colour bar; empty: none is drawn.
        top: the largest ratio of all panels that share a scale; 0: this one's.
    """
    top = top or float(np.nanmax(ratio, initial=1.25))
    limit = min(top, 8.0)
    cmap = LinearSegmentedColormap.from_list("load", LOAD_COLORS).with_extremes(bad="#bbbbbb")
    norm = TwoSlopeNorm(1.0, 0.0, limit)
    image = ax.imshow(ratio, aspect="auto", cmap=cmap, norm=norm, interpolation="nearest")
    step = max(1, -(-len(rows) // 16))
    ax.set_yticks(range(0, len(rows), step), [str(row) for row in rows[::step]])
    step = max(1, -(-ratio.shape[1] // 16))
    ax.set_xticks(range(0, ratio.shape[1], step))
    ax.grid(False)
    if not what:
        return
    bar = fig.colorbar(image, ax=ax, pad=0.01, extend="max" if top > limit else "neither")
    ticks = [0, 0.5, 1, *(t for t in (1.5, 2, 3, 4, 6, 8) if t <= limit)]
    bar.set_ticks(ticks, labels=[f"{t:g}×" for t in ticks])
    bar.ax.tick_params(labelsize=8)
    bar.set_label(what, fontsize=8, color=INK)
