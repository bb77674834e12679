"""Charts of the expert load: which experts are hot, what that makes of the GPUs, over time and across nodes.

Figures come from imbalance.py and traffic.py.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from toolkit import records
from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.imbalance import PointLoad, co_activation, imbalance, summed
from toolkit.analysis.load import Run
from toolkit.analysis.timeline import phases
from toolkit.analysis.traffic import cross_node

MAX_EPOCHS = 5  # placements shown side by side
TOP_PAIRS = 16


@chart(
    "expert_load_heatmap",
    "Tokens that the gate sent to each expert of each MoE layer, as a multiple of the layer's mean, over all measured "
    "load points. White is the mean, red is more, blue is less. Red cells are the hot experts: the GPUs that hold "
    "them set the pace of the layer unless they are replicated or spread.",
)
def expert_load_heatmap(run: Run) -> Figure:
    load, layers = _recorded(run)
    counts = load.expert_counts_LE
    fig = style.figure("Load of each expert", run.name, height=_height(len(layers)))
    ax = fig.subplots()
    style.axes(ax, "logical expert", "layer of the model")
    style.ratio_heatmap(fig, ax, _over_mean(counts.astype(np.float64)), layers, "tokens / mean of the layer")
    return fig


@chart(
    "rank_imbalance",
    "The same load as the EP ranks (GPUs) carry it. Left: each rank's share as a multiple of the layer's mean, one "
    "panel for each placement: before and after each rebalance. Right: the busiest rank of each layer. All ranks wait "
    "for the busiest at the combine: in a layer at 1.5 the average rank idles for a third of the expert time; 1 is "
    "even.",
)
def rank_imbalance(run: Run) -> Figure:
    load, layers = _recorded(run)
    epochs = placements(run)
    fig = style.figure(
        f"Load of each EP rank: busiest at {np.nanmax(imbalance(load.gpu_loads_LG)):.2f}× the mean, "
        f"balancedness {load.balancedness_mean:.2f}",
        run.name,
        width=9.0 + 1.6 * (len(epochs) - 1),
        height=_height(len(layers)),
    )
    *maps, right = fig.subplots(1, len(epochs) + 1, sharey=True, width_ratios=(*[3] * len(epochs), 2))
    top = max(float(np.nanmax(_over_mean(part.gpu_loads_LG), initial=1.25)) for _, part in epochs)
    for ax, (title, part) in zip(maps, epochs, strict=True):
        style.axes(ax, "EP rank", "layer of the model" if ax is maps[0] else "", title)
        what = "tokens / mean of the layer" if ax is maps[-1] else ""
        style.ratio_heatmap(fig, ax, _over_mean(part.gpu_loads_LG), layers, what, top)
    style.axes(right, "busiest rank / mean", "")
    right.grid(False, axis="y")
    if len(epochs) == 1:
        _busiest_bars(right, imbalance(epochs[0][1].gpu_loads_LG), layers)
    else:
        for (title, part), color in zip(epochs, style.ramp(len(epochs)), strict=True):
            right.plot(imbalance(part.gpu_loads_LG), range(len(layers)), marker="o", markersize=3, linewidth=1,
                       color=color, label=title)  # fmt: skip
    right.axvline(1, color=style.INK, linewidth=1, linestyle="--", label="even")
    right.set_xlim(left=0)
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, frameon=False)
    return fig


def placements(run: Run) -> list[tuple[str, PointLoad]]:
    """A title and the load under each placement that had load; of many, the first, the last and some between."""
    windows = run.windows
    assert windows is not None
    held = [epoch for epoch in np.unique(windows.epoch_W) if windows.loads_WLG[windows.epoch_W == epoch].sum() > 0]
    if len(held) > MAX_EPOCHS:
        held = [held[index] for index in np.unique(np.linspace(0, len(held) - 1, MAX_EPOCHS).round().astype(int))]
    if len(held) == 1:
        return [("", summed(windows))]
    return [
        (f"{'first' if epoch == 0 else f'rebalance {epoch}'}", summed(windows.where(windows.epoch_W == epoch)))
        for epoch in held
    ]


def _busiest_bars(ax: Axes, worst: NDArray[np.float64], layers: list[int]) -> None:
    ax.barh(range(len(layers)), worst, height=0.8, color=style.BLUE)
    peak = int(np.nanargmax(worst))
    ax.barh([peak], [worst[peak]], height=0.8, color=style.RED, label=f"layer {layers[peak]}: {worst[peak]:.2f}×")
    ax.set_xlim(0, max(1.05, float(np.nanmax(worst))) * 1.12)


@chart(
    "balancedness_over_time",
    "Balancedness of the GPUs' expert load (mean / busiest, over layers) in each recorder window; 1 is even, the "
    "dotted line is everything on one GPU. Red lines are rebalances: the curve should step up at each and decay as "
    "the traffic drifts. Dots are small windows: with few tokens a window is uneven by chance. The line follows "
    "windows of like size.",
)
def balancedness_over_time(run: Run) -> Figure:
    _recorded(run)
    windows, experts = run.windows, run.experts
    assert windows is not None and experts is not None
    span = phases(run)
    begin = min((phase.begin for phase in span), default=float(windows.times_W2[0, 0]))
    end = max((phase.end for phase in span), default=float(windows.times_W2[-1, 1]))
    windows = windows.between(begin, end)
    fig = style.figure("Balancedness over time", run.name)
    ax = fig.subplots()
    at = windows.times_W2.mean(1) - begin
    even, weight = windows.balancedness(), windows.loads_WLG.sum((1, 2))
    ax.scatter(at, even, s=8 + 40 * weight / max(weight.max(), 1.0), color=style.BLUE, alpha=0.45, linewidth=0,
               label="window (size: tokens)")  # fmt: skip
    ax.plot(*_smoothed(at, even, weight), color=style.BLUE, linewidth=1.8, label="weighted mean of neighbours")
    for number, moment in enumerate(experts.placement_times[1:]):
        ax.axvline(moment - begin, color=style.RED, linewidth=1, label="" if number else "experts have moved")
    for phase in span:
        ax.axvline(phase.begin - begin, color=style.MUTED, linewidth=0.7)
        ax.annotate(f"{phase.concurrency}", (phase.begin - begin, 1.0), xycoords=("data", "axes fraction"),
                    xytext=(3, -10), textcoords="offset points", fontsize=8)  # fmt: skip
    ax.axhline(1 / experts.ep_size, color=style.MUTED, linewidth=0.8, linestyle=":", label="all on one GPU")
    style.axes(ax, "seconds since the first request (labels: concurrency)", "balancedness (mean / busiest GPU)")
    ax.set_ylim(0, 1.03)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return fig


def _smoothed(at: NDArray[np.float64], values: NDArray[np.float64], weight: NDArray[np.float64]) -> tuple[
    NDArray[np.float64], NDArray[np.float64]
]:  # fmt: skip
    """Weighted means of about 40 groups of neighbours."""
    known = np.isfinite(values) & (weight > 0)
    groups = np.array_split(np.flatnonzero(known), min(40, max(int(known.sum()), 1)))
    groups = [group for group in groups if len(group)]
    mean = [float(np.average(values[group], weights=weight[group])) for group in groups]
    return np.array([float(at[group].mean()) for group in groups]), np.array(mean)


@chart(
    "co_activation",
    "The pairs of experts that tokens choose together most often, in a sample of the forward passes, over all layers. "
    "Lift is how many times more often than their popularity alone explains: above 1 they attract each other, and a "
    "placement that puts both on one GPU sends the token there once. Pairs with a lift near 1 are only popular.",
)
def co_activation_chart(run: Run) -> Figure:
    experts = run.experts
    if experts is None or experts.pairs is None or not experts.pairs.any():
        raise ValueError(f"no pairs of experts were counted ({records.EXPERTS})")
    found = co_activation(experts.pairs, TOP_PAIRS)
    fig = style.figure("Experts chosen together", run.name, height=5.2)
    left, right = fig.subplots(1, 2, sharey=True)
    at = range(len(found))[::-1]
    left.barh(at, [count for *_, count, _ in found], color=style.BLUE, height=0.7)
    left.set_yticks(at, [f"layer {experts.layer_ids[layer]}: {one} and {other}" for layer, one, other, *_ in found])
    right.barh(at, [lift for *_, lift in found], color=style.ORANGE, height=0.7)
    right.axvline(1, color=style.INK, linewidth=1, linestyle="--")
    style.axes(left, "tokens that chose both (sample)", "")
    style.axes(right, "lift: times what popularity explains", "")
    return fig


@chart(
    "cross_node_traffic",
    "Share of the (token, expert) assignments whose expert is on another node than the token, for each load point. "
    "The dashed line is what an even spread gives: (nodes - 1) / nodes. Below it, placement keeps traffic on the "
    "node; that matters when the network between nodes is slower than inside. From the loads of nodes, taking the "
    "tokens of each node to spread over experts as all tokens do.",
)
def cross_node_traffic(run: Run) -> Figure:
    shares = cross_node(run)
    nodes = run.plan.get("num_nodes")
    fig = style.figure("Expert traffic that crosses nodes", run.name)
    ax = fig.subplots()
    ax.bar(range(len(shares)), 100 * shares["share"], color=style.BLUE, width=0.6)
    if isinstance(nodes, int) and nodes > 1:
        even = 100 * (nodes - 1) / nodes
        ax.axhline(even, color=style.INK, linestyle="--", linewidth=1, label=f"even over {nodes} nodes: {even:.0f} %")
        ax.legend(fontsize=8, frameon=False)
    ax.set_xticks(range(len(shares)), [f"{value:g}" for value in shares["concurrency"]])
    style.axes(ax, "concurrency (requests in flight)", "assignments that leave their node (%)")
    ax.set_ylim(0, 100)
    return fig


def _recorded(run: Run) -> tuple[PointLoad, list[int]]:
    load, experts = run.whole_load, run.experts
    if load is None or experts is None:
        raise ValueError(f"no expert counts were recorded during the measured requests ({records.EXPERTS})")
    return load, [int(layer) for layer in experts.layer_ids]


def _over_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = values.mean(-1, keepdims=True)
    return values / np.where(mean > 0, mean, np.nan)


def _height(layers: int) -> float:
    return float(np.clip(1.8 + 0.12 * layers, 3.6, 9.0))
