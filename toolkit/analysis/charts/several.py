"""Charts over several runs: the Pareto front, and two runs side by side. Figures come from runs.py and compare.py."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from toolkit.analysis import style

PARETO_CAPTION = (
    "Each point is a load point of a run, labelled with its concurrency: up is more tokens from each GPU, right is a "
    "faster stream for each user. The broad line joins the points that no other beats in both. Pick the point on it at "
    "the speed your users need: its mapping and load are the deployment to choose. Filled: throughput of the steady "
    "state; hollow: of the whole point, ramp-up and tail included, because it has no steady state."
)
COMPARE_CAPTION = (
    "Change of each figure from run A to run B at each concurrency that both have, with 95 % intervals; right of zero "
    "is larger. Filled: the interval leaves zero out, so the runs differ; hollow: the same within the noise of one "
    "run. For latencies larger is worse, for throughput better. Repeats show what differs from run to run, which "
    "these do not."
)
SHOWN = ("ttft_p50_ms", "ttft_p99_ms", "itl_mean_ms", "tpot_p50_ms", "tpot_p99_ms", "e2e_p50_ms", "e2e_p99_ms",
         "output_tok_s")  # fmt: skip
MAX_LABELS = 60


def pareto_figure(points: pd.DataFrame) -> Figure:
    """``Runs.pareto`` -> the front.

    Raises:
        ValueError: no load point has both figures.
    """
    if points.empty:
        raise ValueError("no load point has a throughput and a speed")
    fig = style.figure("Throughput of a GPU against speed of a user", f"{points['run'].nunique()} runs", height=6.0)
    ax = fig.subplots()
    x, y = "output_tok_s_per_user", "tok_s_per_gpu"
    line = points[points["front"]].sort_values(x)
    ax.plot(line[x], line[y], linewidth=7, color=style.GRID, solid_capstyle="round", label="Pareto front")
    names = points["mapping"].where(points["mapping"] != "", points["run"])
    if names.nunique() > len(style.SERIES):  # those on the front are told apart first
        told = pd.concat([names[points["front"]], names]).unique()[: len(style.SERIES) - 1]
        names = names.where(names.isin(told), "others")
    for look, (name, rows) in zip(style.SERIES, points.groupby(names, sort=False)):
        label: str | None = str(name)
        for _, run in rows.groupby("run", sort=False):
            ordered = run.sort_values(x)
            ax.plot(ordered[x], ordered[y], linewidth=1, color=look["color"], linestyle=":")
        for filled, some in rows.groupby("steady"):
            face = look["color"] if filled else "white"
            ax.plot(some[x], some[y], **(look | {"linestyle": "none"}), markersize=6, markerfacecolor=face, label=label)
            label = None
    shown = points if len(points) <= MAX_LABELS else points[points["front"]]
    for _, row in shown.iterrows():
        ax.annotate(f"{row['concurrency']:g}", (row[x], row[y]), xytext=(6, 4), textcoords="offset points", fontsize=8,
                    color=style.INK if row["front"] else style.MUTED)  # fmt: skip
    title = "labels: concurrency"
    style.axes(ax, "output tok/s of a user (mean 1 / TPOT)", "output tok/s per GPU, steady state", title)
    ax.margins(0.08)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False)
    return fig


def compare_figure(table: pd.DataFrame, a: str, b: str) -> Figure:
    """``compare(a, b)`` -> one panel a concurrency, at most six, with the change of each figure."""
    levels = sorted(table["concurrency"].unique())[-6:]
    fig = style.figure("Change from A to B", f"A: {a}   B: {b}", width=max(5.5, 3.2 * len(levels) + 1.5), height=4.4)
    for ax, level in zip(np.atleast_1d(fig.subplots(1, len(levels), sharey=True)), levels, strict=True):
        rows = table[(table["concurrency"] == level) & table["figure"].isin(SHOWN)].reset_index(drop=True)
        at = np.arange(len(rows))[::-1]
        known = rows["change_low"].notna()
        ax.hlines(at[known], 100 * rows["change_low"][known], 100 * rows["change_high"][known], color=style.BLUE)
        sure = rows["verdict"].isin(("higher", "lower")).to_numpy()
        for mask, face in ((sure, style.BLUE), (~sure, "white")):
            ax.scatter(100 * rows["change"][mask], at[mask], s=32, facecolor=face, edgecolor=style.BLUE, zorder=3)
        ax.axvline(0, color=style.INK, linewidth=1)
        ax.set_yticks(at, rows["figure"].str.replace("_ms", " (ms)", regex=False).tolist())
        style.axes(ax, "change (%)", "", f"concurrency {level:g}")
    return fig
