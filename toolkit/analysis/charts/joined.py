"""Expert imbalance joined with latency. Moments and the model come from toolkit/analysis/join.py."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.join import moments
from toolkit.analysis.load import Run


@chart(
    "imbalance_vs_latency",
    "Each dot is a moment (one window of the expert recorder): how uneven the expert load on the GPUs was, and how "
    "long the forward passes of the same moment took, and the gaps between the tokens that came in it. Larger dots "
    "had more tokens in a pass. Dots that rise to the right cost time by imbalance. Right: of the mean pass of each "
    "load point, the part that waits for the busiest expert GPU and for the fullest DP rank, by a model that holds "
    "batch size and prefill fixed, with 95 % intervals; hatched: cannot be told from zero. It is the most that a "
    "perfect balance saves.",
)
def imbalance_vs_latency(run: Run) -> Figure:
    frame = moments(run)
    if frame.empty:
        raise ValueError("no recorder window lies in a load point (experts.npz)")
    found = run.losses
    if not found:
        raise ValueError("no forward pass lies in a recorder window (steps/)")
    fig = style.figure("Expert imbalance and latency of the same moments", run.name, width=12, height=4.8)
    step, itl, parts = fig.subplots(1, 3, width_ratios=(4, 4, 3))
    levels = sorted(frame["concurrency"].unique())
    biggest = max(float(frame["tokens"].max()), 1.0)
    for level, color in zip(levels, style.ramp(len(levels)), strict=True):
        rows = frame[frame["concurrency"] == level]
        size = 10 + 60 * rows["tokens"].fillna(0) / biggest
        for ax, column in ((step, "step_ms"), (itl, "itl_ms")):
            ax.scatter(rows["imbalance"], rows[column], s=size, color=color, alpha=0.7, linewidth=0, label=f"{level}")
    for ax, column, title in ((step, "step_ms", "forward pass"), (itl, "itl_ms", "ITL of tokens that came")):
        style.axes(ax, "imbalance: busiest GPU / mean", "ms (mean of the moment)", title)
        style.latency_axis(ax, frame[column].to_numpy(np.float64))
    step.legend(title="concurrency", fontsize=7, title_fontsize=7, frameon=False, ncols=2)
    at = np.arange(len(found))
    parts.bar(at, [loss.step_ms for loss in found], color=style.GRID, width=0.7, label="mean forward pass")
    for shift, name, color, label in (
        (-0.17, "bounded", style.RED, "waits for the busiest expert GPU"),
        (0.17, "attention_ms", style.ORANGE, "waits for the fullest DP rank"),
    ):
        for place, loss in enumerate(found):
            part = getattr(loss, name)
            if part is None or not np.isfinite(part.low):
                continue
            shown = max(part.value, 0.0)
            parts.bar(place + shift, shown, width=0.3, color=color if part.low > 0 else "white", edgecolor=color,
                      hatch="" if part.low > 0 else "////", label=label)  # fmt: skip
            parts.vlines(place + shift, max(part.low, 0.0), max(part.high, 0.0), color=style.INK, linewidth=1)
    parts.set_xticks(at, [str(loss.concurrency) for loss in found])
    style.axes(parts, "concurrency", "ms of a pass", "where a pass waits")
    parts.set_ylim(0, 1.35 * max(loss.step_ms for loss in found))
    handles, labels = parts.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    parts.legend(once.values(), once.keys(), fontsize=7, frameon=False, loc="upper left")
    return fig
