"""Chart of the rebalances of experts: what each did to the balance, and what it cost. Figures are rebalances.py's."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import NotAsked, chart
from toolkit.analysis.load import Run
from toolkit.analysis.rebalances import MB, Outcome, outcomes, stretches
from toolkit.analysis.timeline import phases


@chart(
    "rebalances",
    "Above: balancedness of the ranks' expert load (mean / busiest) in the stretches between rebalances: thick, of all "
    "rows that ranks received in it; dotted, the mean of its recorder windows, which are uneven by chance, too. Each "
    "arrow is a rebalance, from the balance of the old placement to that of the new one for the counts it was planned "
    "from, with replicas sharing evenly. The thick line should follow the arrows. Below: what steps waited "
    "for, chunk by chunk, and how much was moved. Transfers run beside the steps and are no pause.",
)
def rebalances_chart(run: Run) -> Figure:
    found = outcomes(run)
    if not found:
        raise NotAsked("no experts were rebalanced")
    span = phases(run)
    start = min((phase.begin for phase in span), default=found[0].before.begin)
    fig = style.figure(f"{len(found)} rebalances of experts", run.name, height=6.0)
    above, below = fig.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _balance(above, run, found, start)
    _cost(below, found, start)
    for phase in span:
        for ax in (above, below):
            ax.axvline(phase.begin - start, color=style.MUTED, linewidth=0.7)
        above.annotate(f"{phase.concurrency}", (phase.begin - start, 1.0), xycoords=("data", "axes fraction"),
                       xytext=(3, -10), textcoords="offset points", fontsize=8)  # fmt: skip
    return fig


def _balance(ax: Axes, run: Run, found: list[Outcome], start: float) -> None:
    for index, stretch in enumerate(stretches(run)):
        if np.isfinite(stretch.balancedness):
            span = (stretch.begin - start, stretch.end - start)
            ax.hlines(stretch.balancedness, *span, color=style.BLUE, linewidth=2.5,
                      label="measured, the stretch as a whole" if index == 0 else "_")  # fmt: skip
            ax.hlines(stretch.by_window, *span, color=style.BLUE, linewidth=1, linestyle=":",
                      label="measured, mean of its windows" if index == 0 else "_")  # fmt: skip
    for outcome in found:
        line, at = outcome.record, outcome.record.t_end - start
        before, after = line.balancedness_before, line.balancedness_after
        if before is None or after is None:
            continue
        color = style.RED if line.state == "aborted" else style.INK
        ax.annotate("", (at, after), (at, before), arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.2})
        ax.plot([at], [before], marker="o", markersize=3, color=color)
        if line.balancedness_bound is not None:
            ax.plot([at], [line.balancedness_bound], marker="_", markersize=9, color=style.ORANGE)
    ax.plot([], [], color=style.INK, marker=r"$\uparrow$", linestyle="none", label="planned: before to after")
    ax.plot([], [], color=style.ORANGE, marker="_", markersize=9, linestyle="none", label="bound of any placement")
    style.axes(ax, "", "balancedness (mean / busiest rank)")
    ax.set_ylim(0, 1.05)
    ax.legend(fontsize=8, frameon=False, loc="lower right", ncols=3)


def _cost(ax: Axes, found: list[Outcome], start: float) -> None:
    for outcome in found:
        line = outcome.record
        at = np.linspace(line.t_begin - start, line.t_end - start, len(line.pauses_ms))
        ax.vlines(at, 0, line.pauses_ms, color=style.ORANGE, linewidth=1.5)
        ax.plot(at, line.pauses_ms, "o", markersize=3, color=style.ORANGE)
        moved = (line.same_node_bytes + line.cross_node_bytes) / MB
        ax.annotate(f"{line.moved_slots} slots\n{moved:.1f} MB", (line.t_end - start, max(line.pauses_ms, default=0.0)),
                    xytext=(4, 2), textcoords="offset points", fontsize=7, color=style.INK)  # fmt: skip
    style.axes(ax, "seconds since the first request (labels: concurrency)", "pause (ms)")
    ax.set_ylim(0, 1.35 * max((max(o.record.pauses_ms, default=0.0) for o in found), default=1.0) or 1.0)
