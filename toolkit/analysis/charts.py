"""The charts of a run folder, one PNG each, registered by name.

Owns what is drawn and what each caption says; style.py owns the look, metrics.py and imbalance.py the figures.
A chart that cannot be drawn says why, and the others are drawn.
Read next: report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from toolkit import records
from toolkit.analysis import style
from toolkit.analysis.imbalance import PointLoad, imbalance
from toolkit.analysis.load import Run
from toolkit.analysis.metrics import itl_s, succeeded
from toolkit.registry import Registry

Draw = Callable[[Run], Figure]


@dataclass(frozen=True)
class Chart:
    """How a chart is drawn, and what its reader should look for. ``draw`` raises ``ValueError`` if there is no data."""

    draw: Draw
    caption: str


@dataclass(frozen=True)
class Drawn:
    """A chart of a run: its file, or the reason why there is none."""

    name: str
    caption: str
    path: Path | None
    problem: str = ""


CHARTS: Registry[Chart] = Registry("chart")


def draw_charts(run: Run) -> list[Drawn]:
    """Draws every registered chart into the run's charts folder, replacing those of an earlier call."""
    folder = run.path / records.CHARTS
    folder.mkdir(exist_ok=True)
    drawn = []
    for name in CHARTS:
        chart, path = CHARTS[name], folder / f"{name}.png"
        try:
            fig = chart.draw(run)
            with records.replacing(path, "wb") as out:
                fig.savefig(out, format="png", dpi=style.DPI)
            drawn.append(Drawn(name, chart.caption, path))
        except Exception as error:  # one chart must not cost the others
            path.unlink(missing_ok=True)
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            drawn.append(Drawn(name, chart.caption, None, why))
    return drawn


def chart(name: str, caption: str) -> Callable[[Draw], Draw]:
    """Decorator: registers a drawing function as the chart ``name``."""

    def add(draw: Draw) -> Draw:
        CHARTS.register(name)(Chart(draw, caption))
        return draw

    return add


@chart(
    "latency_vs_concurrency",
    "Latency as the load grows: time to first token, gap between tokens, mean time per output token of a request, "
    "and the whole answer; median, 90th and 99th percentile of the requests that succeeded. TTFT that climbs "
    "while TPOT stays flat is queueing or prefill; TPOT that climbs is a slower decode step; a p99 far above the p50 "
    "is an uneven service. With fewer than 100 requests in a point, p99 is close to the slowest request.",
)
def latency_vs_concurrency(run: Run) -> Figure:
    sweep = run.sweep[run.sweep["e2e_p50_ms"].notna()]
    if sweep.empty:
        raise ValueError("no load point has a request that succeeded")
    sweep = sweep.sort_values("concurrency")
    panels = {
        "ttft": "TTFT: send to first token",
        "itl": "ITL: gap between tokens",
        "tpot": "TPOT: mean of a request",
        "e2e": "E2E: send to last token",
    }
    fig = style.figure("Latency against concurrency", run.name, height=6.2)
    for ax, (metric, title) in zip(fig.subplots(2, 2).flat, panels.items(), strict=True):
        columns = [f"{metric}_{stat}_ms" for stat in ("p50", "p90", "p99")]
        for column, line in zip(columns, style.LINES, strict=True):
            stat = column.split("_")[1]
            ax.plot(sweep["concurrency"], sweep[column], label=stat, markersize=5, linewidth=1.6, **line)
        style.axes(ax, "concurrency (requests in flight)", "ms", title)
        style.concurrency_axis(ax, sweep["concurrency"].tolist())
        style.latency_axis(ax, sweep[columns].to_numpy(np.float64))
    fig.axes[0].legend(fontsize=8, frameon=False)
    return fig


@chart(
    "throughput_vs_latency",
    "What a GPU delivers against what a user sees; each point is a load point, labelled with its concurrency. "
    "Left: up is more tokens from each GPU, right is a faster stream for each user; a better deployment lies further "
    "up and right. Right: the same throughput against the wait for the first token; up and left is better. Where the "
    "curve turns, more load costs latency and buys no throughput.",
)
def throughput_vs_latency(run: Run) -> Figure:
    sweep = run.sweep.sort_values("concurrency")
    sweep = sweep[sweep["output_tok_s_per_gpu"].notna()]
    if sweep.empty:
        raise ValueError("no load point has a throughput")
    fig = style.figure("Throughput of a GPU against latency of a user", run.name)
    left, right = fig.subplots(1, 2, sharey=True)
    gpu = sweep["output_tok_s_per_gpu"]
    # Labels stand where the curve is not: it falls to the right in one panel and rises in the other.
    for ax, column, beside in ((left, "output_tok_s_per_user", (6, 5)), (right, "ttft_p50_ms", (7, -10))):
        ax.plot(sweep[column], gpu, markersize=6, linewidth=1.4, **style.LINES[0])
        for x, y, concurrency in zip(sweep[column], gpu, sweep["concurrency"], strict=True):
            ax.annotate(f"{concurrency:g}", (x, y), xytext=beside, textcoords="offset points", fontsize=8)
        ax.margins(0.12)
        ax.set_xlim(left=0)
    style.axes(left, "output tok/s of a user (mean 1 / TPOT)", "output tok/s per GPU", "labels: concurrency")
    style.axes(right, "TTFT p50 (ms)", "")
    left.set_ylim(bottom=0)
    return fig


@chart(
    "itl_distribution",
    "Share of output tokens that came within a given gap after the one before, for each load point. A steep curve is "
    "an even stream. A step or a long tail to the right are tokens held up: by prefill of other requests in the same "
    "step, by a rank that others wait for, or by preemption. Tokens that share a chunk share its gap.",
)
def itl_distribution(run: Run) -> Figure:
    pools = [(point.concurrency, np.sort(itl_s(succeeded(point.requests))) * 1e3) for point in run.points]
    pools = [(concurrency, gaps) for concurrency, gaps in pools if len(gaps) and gaps[-1] > 0]
    if not pools:
        raise ValueError("no request has two tokens in different chunks")
    fig = style.figure("Gap between output tokens", run.name)
    ax = fig.subplots()
    for (concurrency, gaps), color in zip(pools, style.ramp(len(pools)), strict=True):
        share = np.arange(1, len(gaps) + 1) / len(gaps)
        keep = np.unique(np.linspace(0, len(gaps) - 1, 2000).astype(np.int64))  # more points than pixels show nothing
        keep = keep[gaps[keep] > 0]
        label = f"concurrency {concurrency} ({len(gaps):,} tokens)"
        ax.step(gaps[keep], share[keep] * 100, where="post", color=color, linewidth=1.8, label=label)
    for percent in (50, 90, 99):
        ax.axhline(percent, color=style.MUTED, linewidth=0.7, linestyle=":")
    style.axes(ax, "ITL (ms, log scale)", "share of tokens at or below (%)")
    ax.set_xscale("log")
    style.plain_numbers(ax.xaxis)
    lowest = min(float(np.percentile(gaps[gaps > 0], 0.5)) for _, gaps in pools)
    ax.set_xlim(lowest / 1.2, max(float(gaps[-1]) for _, gaps in pools) * 1.2)
    ax.set_ylim(0, 101)
    ax.set_yticks([0, 25, 50, 75, 90, 99])
    fig.legend(fontsize=8, frameon=False, loc="outside right upper")
    return fig


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
    "The same load as the EP ranks (GPUs) carry it under the placement in force. Left: each rank's share as a "
    "multiple of the layer's mean. Right: the busiest rank of each layer. All ranks wait for the busiest at the "
    "combine: in a layer at 1.5 the average rank idles for a third of the expert time; 1 is even.",
)
def rank_imbalance(run: Run) -> Figure:
    load, layers = _recorded(run)
    loads = load.gpu_loads_LG
    worst = imbalance(loads)
    fig = style.figure(
        f"Load of each EP rank: busiest at {np.nanmax(worst):.2f}× the mean, balancedness {load.balancedness_mean:.2f}",
        run.name,
        height=_height(len(layers)),
    )
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    style.axes(left, "EP rank", "layer of the model")
    style.ratio_heatmap(fig, left, _over_mean(loads), layers, "tokens / mean of the layer")
    style.axes(right, "busiest rank / mean", "")
    right.grid(False, axis="y")
    right.barh(range(len(layers)), worst, height=0.8, color=style.BLUE)
    peak = int(np.nanargmax(worst))
    right.barh([peak], [worst[peak]], height=0.8, color=style.RED, label=f"layer {layers[peak]}: {worst[peak]:.2f}×")
    right.axvline(1, color=style.INK, linewidth=1, linestyle="--", label="even")
    right.set_xlim(0, max(1.05, float(np.nanmax(worst))) * 1.12)
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, frameon=False)
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
