"""Charts of throughput: against latency, and what of it keeps the SLO. Figures come from metrics.py."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.findings import SLO_SHARE, goodputs, largest_load
from toolkit.analysis.levels import run_levels, steady_per_gpu
from toolkit.analysis.load import Run


@chart(
    "throughput_vs_latency",
    "What a GPU delivers against what a user sees; each point is a load point, labelled with its concurrency. "
    "Left: up is more tokens from each GPU, right is a faster stream for each user; a better deployment lies further "
    "up and right. Right: the same throughput against the wait for the first token; up and left is better. Where the "
    "curve turns, more load costs latency and buys no throughput. Filled: throughput of the steady state; hollow: of "
    "the whole point, ramp-up and tail included, because it has no steady state.",
)
def throughput_vs_latency(run: Run) -> Figure:
    levels = run_levels(run)
    levels = levels[levels["output_tok_s_per_gpu"].notna()] if len(levels) else levels
    if levels.empty:
        raise ValueError("no load point has a throughput")
    fig = style.figure("Throughput of a GPU against latency of a user", run.name)
    left, right = fig.subplots(1, 2, sharey=True)
    rates = steady_per_gpu(levels)
    gpu, steady = rates["tok_s_per_gpu"], rates["steady"]
    # Labels stand where the curve is not: it falls to the right in one panel and rises in the other.
    for ax, column, beside in ((left, "output_tok_s_per_user", (6, 5)), (right, "ttft_p50_ms", (7, -10))):
        ax.plot(levels[column], gpu, linewidth=1.4, color=style.BLUE)
        ax.scatter(levels[column][steady], gpu[steady], s=36, color=style.BLUE, zorder=3)
        ax.scatter(levels[column][~steady], gpu[~steady], s=36, facecolor="white", edgecolor=style.BLUE, zorder=3)
        for x, y, concurrency in zip(levels[column], gpu, levels["concurrency"], strict=True):
            if np.isfinite(x):
                ax.annotate(f"{concurrency:g}", (x, y), xytext=beside, textcoords="offset points", fontsize=8)
        ax.margins(0.12)
        ax.set_xlim(left=0)
    style.axes(left, "output tok/s of a user (mean 1 / TPOT)", "output tok/s per GPU", "labels: concurrency")
    style.axes(right, "TTFT p50 (ms)", "")
    left.set_ylim(bottom=0)
    return fig


@chart(
    "goodput_vs_load",
    "Requests that keep the SLO of the config. Left: good requests per second, beside all that succeeded: where the "
    "two part, more load is served too late to count. Right: the share of the requests that keeps each bound; the "
    "bound that falls first is the one to work on. The dashed line marks the largest load that meets the SLO, with "
    "all smaller ones meeting it too. Failed requests are not good; those given up as asked are not judged.",
)
def goodput_vs_load(run: Run) -> Figure:
    if not run.slo:
        raise ValueError("no SLO is set: load.slo_ttft_ms, slo_itl_ms, slo_tpot_ms, slo_e2e_ms")
    found = goodputs(run, run.slo)
    if not found:
        raise ValueError("no load point has requests to judge by")
    levels = run_levels(run)
    loads = [concurrency for concurrency, _ in found]
    per_second = (levels["requests"] - levels["failed"] - levels["cancelled"]) / levels["duration_s"]
    served = per_second[levels["concurrency"].isin(loads)].tolist()
    fig = style.figure(f"Goodput: {run.slo}", run.name)
    left, right = fig.subplots(1, 2)
    left.plot(loads, served, label="all that succeeded", **style.LINES[1])
    left.plot(loads, [good.req_s for _, good in found], label="good", **style.LINES[0])
    style.axes(left, "concurrency (requests in flight)", "requests/s", "rate of requests")
    left.set_ylim(bottom=0)
    right.plot(loads, [100 * good.share for _, good in found], label="all bounds", color=style.INK, linewidth=2)
    for name, line in zip(found[0][1].by_bound, (*style.LINES, style.LINES[0]), strict=False):
        right.plot(loads, [100 * good.by_bound[name] for _, good in found], label=name.upper(), **line)
    right.axhline(100 * SLO_SHARE, color=style.MUTED, linewidth=0.8, linestyle=":")
    style.axes(right, "concurrency (requests in flight)", "of the measured requests (%)", "share that keeps")
    right.set_ylim(0, 103)
    best = largest_load(found)
    for ax in (left, right):
        if best is not None:
            ax.axvline(best[0], color=style.MUTED, linestyle="--", linewidth=1, label=f"largest: {best[0]}")
        style.concurrency_axis(ax, loads)
        ax.legend(fontsize=8, frameon=False)
    return fig
