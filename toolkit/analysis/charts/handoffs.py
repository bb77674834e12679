"""The chart of disaggregated serving: what the first token waits for, and how fast KV travels. See ../handoffs.py."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import NotAsked, chart
from toolkit.analysis.handoffs import PHASES, by_point
from toolkit.analysis.load import Run


@chart(
    "handoffs",
    "Disaggregated serving, at each load point. Left: what the first token waits for, mean of the requests: "
    "the prefill worker's queue, the prompt's computation, and then what handing it on costs: the wait for the read to "
    "begin, the part of the KV transfer that the computation does not hide, the rest of the decode step under way. The "
    "line is the gap to the second token. A queue that grows asks for more prefill workers, a join or a gap that grows "
    "for more decode workers. Right: median and p99 of the transfer itself, with its rate on one rank, the share of it "
    "that is hidden beside prefill, and what is not hidden as a share of the time to the first token: the most that "
    "sending each layer as it is computed could save.",
)
def handoffs(run: Run) -> Figure:
    if run.transfers.empty:
        raise NotAsked("no KV was handed from worker to worker: serving is aggregated")
    table = by_point(run)
    fig = style.figure("From prefill to decode: what the first token waits for", run.name, height=5.2)
    left, right = fig.subplots(1, 2)
    at, base = np.arange(len(table)), np.zeros(len(table))
    for (name, label), color in zip(PHASES, style.ramp(len(PHASES))):
        height = 1e3 * table[name].to_numpy()
        left.bar(at, height, bottom=base, width=0.62, color=color, label=label)
        base += height
    left.plot(at, 1e3 * table["first_decode"], label="gap to the second token", **style.LINES[2], linewidth=1.2)
    left.set_ylim(0, 1.12 * max(base.max(), 1e3 * table["first_decode"].max()))
    for x, total in zip(at, base):
        left.annotate(f"{total:.0f}", (x, total), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
    style.axes(left, "concurrency", "mean time (ms)", "Time to the first token")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    for column, label, line in (("transfer_ms_p50", "p50", style.LINES[0]), ("transfer_ms_p99", "p99", style.LINES[1])):
        right.plot(at, table[column], label=label, **line)
    for x, row in zip(at, table.itertuples()):
        text = f"{row.gb_s:.3g} GB/s\n{row.hidden:.0%} hidden\n{row.exposed:.1%} of TTFT"
        right.annotate(
            text, (x, row.transfer_ms_p99), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7
        )
    right.set_ylim(0, 1.4 * float(table["transfer_ms_p99"].max()))
    right.legend(fontsize=8, frameon=False, loc="upper right")
    style.axes(right, "concurrency", "KV transfer (ms)", f"Transfers of {table['mb'].mean():.3g} MB a rank")
    for ax in (left, right):
        ax.set_xticks(at, [f"{c:g}" for c in table["concurrency"]])
        ax.set_xlim(-0.6, len(table) - 0.4)
    return fig
