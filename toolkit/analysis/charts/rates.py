"""The rate match: how many decode GPUs one prefill GPU feeds. Figures come from ../rates.py."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.goodput import Slo

RATES_CAPTION = (
    "How many decode GPUs one prefill GPU feeds, for each length of prompt and answer, against the time a token takes "
    "on the decode side; labels are requests in the decode batch. Each point is a load point with the decode pool "
    "loaded alone and full, set against the fastest prefill point of the same prompts that keeps the bound on TTFT. "
    "Fewer requests a batch give faster tokens and need more decode GPUs. Filled: the point to choose, the most tokens "
    "a GPU within the bound on TPOT (dotted line). A deployment with more decode GPUs than that starves them, one with "
    "fewer lets prefill wait."
)


def rates_figure(table: pd.DataFrame, slo: Slo) -> Figure:
    """``rates.rate_match`` -> the chart."""
    fig = style.figure(
        "Decode GPUs that one prefill GPU feeds", ", ".join(sorted(table["run"].unique())[:3]), height=5.0
    )
    ax = fig.subplots()
    for i, ((isl, osl), rows) in enumerate(table.groupby(["isl", "osl"])):
        line = style.LINES[i % len(style.LINES)]
        rate = rows["prefill_req_s_per_gpu"].iloc[0]
        label = f"ISL {isl:g}, OSL {osl:g} (prefill: {rate:.3g} prompts/s a GPU)"
        ordered = rows.sort_values("concurrency")
        ax.plot(ordered["tpot_ms"], ordered["decode_gpus"], linewidth=1.3, markerfacecolor="white", label=label, **line)
        best = rows[rows["chosen"]]
        ax.plot(best["tpot_ms"], best["decode_gpus"], **(line | {"linestyle": "none"}), markersize=9)
        for row in rows.itertuples():
            bold = "bold" if row.chosen else "normal"
            ax.annotate(
                f"{row.concurrency}: {row.decode_gpus:.2g}", (row.tpot_ms, row.decode_gpus), xytext=(6, 5),
                textcoords="offset points", fontsize=8, fontweight=bold, color=line["color"],
            )  # fmt: skip
    if slo.tpot_ms:
        ax.axvline(slo.tpot_ms, color=style.MUTED, linestyle=":", linewidth=1)
    asked = f" (bounds: {slo})" if slo else ""
    style.axes(ax, "time a token, decode batch full (ms)", "decode GPUs for one prefill GPU", f"by length{asked}")
    ax.set_ylim(0, 1.15 * float(table["decode_gpus"].max()))
    ax.set_xlim(0, 1.15 * max(float(table["tpot_ms"].max()), slo.tpot_ms))
    ax.legend(fontsize=8, frameon=False)
    return fig
