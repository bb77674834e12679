"""What a run says, in sentences: the verdict and the expert load. What to be wary of is trust.py's.

Owns the rules that turn figures into words; every sentence carries the figures it rests on. Computes no latency
(metrics.py) and no load (imbalance.py) itself; knows nothing of HTML.
Read next: report.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from toolkit.analysis.goodput import Goodput, Slo, goodput
from toolkit.analysis.imbalance import imbalance
from toolkit.analysis.join import Loss
from toolkit.analysis.load import Run

SATURATED = 0.03  # throughput gain below which more load is said to buy nothing
START_AND_TAIL = 0.05  # share of a point's throughput from which it is worth a word
STILL_RISING = 0.10  # gain at the last load point above which the limit is said not to be reached
EVEN = 0.95  # balancedness above which the experts are not worth a thought
SLO_SHARE = 0.99  # of the measured requests must be good for a load to meet the SLO


@dataclass(frozen=True)
class Finding:
    """One thing the run says: a word to find it by, and the sentence."""

    label: str
    text: str


def number(value: float) -> str:
    """Three significant figures, thousands separated; a dash where there is no value."""
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def best_row(run: Run) -> int | None:
    """Position in ``run.sweep`` of the best valid load point: the lowest load within 3 % of the top throughput."""
    throughput = run.sweep["output_tok_s"].where(run.sweep["state"] != "invalid").to_numpy(np.float64)
    if not np.isfinite(throughput).any():
        return None
    near = np.flatnonzero(throughput >= (1 - SATURATED) * np.nanmax(throughput))
    return int(near[np.argmin(run.sweep["concurrency"].to_numpy()[near])])


def verdict(run: Run) -> list[Finding]:
    """The best load point, what limits the deployment there, where the time goes, and what the experts cost."""
    findings = _outcome(run)
    position = best_row(run)
    if position is None:
        return [
            *findings,
            Finding("No result", "No load point has a request that succeeded, or figures that are valid."),
        ]
    best = run.sweep.iloc[position]
    findings.append(
        Finding(
            "Best point",
            f"{number(best['output_tok_s'])} output tok/s ({number(best['output_tok_s_per_gpu'])} per GPU) at "
            f"concurrency {best['concurrency']:g}; each user sees {number(best['output_tok_s_per_user'])} tok/s after "
            f"a TTFT of {number(best['ttft_p50_ms'])} ms (p50; p99 {number(best['ttft_p99_ms'])} ms)." + _steady(best),
        )
    )
    if run.slo:
        findings.append(slo_finding(run, run.slo))
    shown = run.sweep[run.sweep["output_tok_s"].notna() & (run.sweep["state"] != "invalid")]
    findings += _limit(shown.sort_values("concurrency"), best)
    load = run.point_loads[position]
    if load is not None and math.isfinite(load.balancedness_mean):
        findings.append(_expert_cost(load.balancedness_mean))
    found = loss_at(run.losses, int(best["concurrency"]))
    if found is not None:
        findings.append(Finding("Waiting", found.sentence()))
    return findings


def _steady(best: pd.Series[float]) -> str:
    """What the throughput is in the steady state, where that is another one."""
    steady, whole = best["steady_output_tok_s"], best["output_tok_s"]
    if not math.isfinite(steady) or abs(steady / whole - 1) < START_AND_TAIL:
        return ""
    return f" Without start and tail of the point it delivers {number(steady)} tok/s."


def loss_at(found: list[Loss], concurrency: int) -> Loss | None:
    """The loss of the load point ``concurrency``, or of the highest one that has any."""
    return next((loss for loss in found if loss.concurrency == concurrency), found[-1] if found else None)


def goodputs(run: Run, slo: Slo) -> list[tuple[int, Goodput]]:
    """Concurrency and goodput of each load point, repeats together, ascending."""
    groups: dict[int, list[pd.DataFrame]] = {}
    for point in run.points:
        if point.valid and len(point.requests):
            groups.setdefault(point.concurrency, []).append(point.requests)
    return [(c, mean_goodput([goodput(rows, slo) for rows in groups[c]])) for c in sorted(groups)]


def mean_goodput(repeats: list[Goodput]) -> Goodput:
    return Goodput(
        req_s=float(np.mean([g.req_s for g in repeats])),
        tok_s=float(np.mean([g.tok_s for g in repeats])),
        share=float(np.mean([g.share for g in repeats])),
        by_bound={name: float(np.mean([g.by_bound[name] for g in repeats])) for name in repeats[0].by_bound},
    )


def largest_load(found: list[tuple[int, Goodput]]) -> tuple[int, Goodput] | None:
    """The largest load that meets the SLO, with every smaller one meeting it too (a lucky outlier is no capacity)."""
    best = None
    for concurrency, good in found:
        if not good.share >= SLO_SHARE:
            break
        best = (concurrency, good)
    return best


def slo_finding(run: Run, slo: Slo) -> Finding:
    found = goodputs(run, slo)
    best = largest_load(found)
    if best is not None:
        concurrency, good = best
        more = "" if concurrency < found[-1][0] else ", the highest tried: the limit lies above"
        return Finding(
            "SLO",
            f"{slo} holds for {SLO_SHARE:.0%} of the requests up to concurrency {concurrency}{more}: "
            f"{number(good.req_s)} good requests/s, {number(good.tok_s)} output tok/s.",
        )
    if not found:
        return Finding("SLO", f"{slo}: no load point has requests to judge by.")
    concurrency, good = found[0]
    broken = min(good.by_bound, key=lambda name: good.by_bound[name])
    return Finding(
        "SLO",
        f"{slo} is met by no load: at concurrency {concurrency} only {good.share:.0%} of the requests are good; "
        f"{broken.upper()} is kept by {good.by_bound[broken]:.0%}.",
    )


def expert_summary(run: Run) -> list[str]:
    """The expert load of the whole run, in words; empty where none was recorded."""
    load, experts = run.whole_load, run.experts
    if load is None or experts is None:
        return []
    layers = [int(layer) for layer in experts.layer_ids]
    counts = load.expert_counts_LE
    ratio = counts / np.maximum(counts.mean(-1, keepdims=True), 1e-9)
    layer, expert = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    worst = np.nan_to_num(imbalance(load.gpu_loads_LG), nan=1.0)
    top = np.argsort(worst)[::-1][:3]
    busiest = int(np.argmax(load.gpu_loads_LG[top[0]]))
    slots, hottest = experts.placement.shape[2], number(ratio[layer, expert])
    worst_layers = ", ".join(f"{layers[i]} ({worst[i]:.2f})" for i in top)
    sentences = [
        (
            f"{counts.shape[1]} experts in {slots} slots on {experts.ep_size} EP ranks, {counts.shape[0]} MoE layers, "
            f"{load.windows} windows, {int(counts.sum()):,} (token, expert) assignments."
        ),
        (
            f"The hottest expert is {expert} of layer {layers[layer]}: {hottest} times its layer's mean. "
            f"The median layer's hottest expert is at {number(float(np.median(ratio.max(-1))))} times."
        ),
        (
            f"The busiest EP rank is {busiest} in layer {layers[top[0]]}: {worst[top[0]]:.2f} times the mean. "
            f"Layers with the largest imbalance: {worst_layers}; median layer {float(np.median(worst)):.2f}."
        ),
        (
            f"Balancedness, mean over windows and layers: {load.balancedness_mean:.2f} (1 is even, "
            f"{1 / experts.ep_size:.2f} is everything on one rank). Windows with few tokens look less even by chance."
        ),
    ]
    if len(experts.placement) > 1:
        sentences.append(f"The placement changed {len(experts.placement) - 1} times during the run.")
    return sentences


def _outcome(run: Run) -> list[Finding]:
    """How the run ended, unless it is done and whole."""
    status = run.status
    if status is None:
        return []
    findings = []
    if run.state == "running":
        findings.append(Finding("Incomplete", "The run goes on."))
    elif run.state == "dead":
        text = "status.json says running, but its launcher gives no sign of life: it was killed, or its node lost."
        findings.append(Finding("Dead", f"{text} Take it up again with resume=true."))
    elif status.state != "done":
        findings.append(Finding(f"Run {status.state}", status.reason or "no reason was given"))
    unfinished = [
        f"{point.concurrency} {point.state}" + (f" ({point.reason})" if point.reason else "")
        for point in status.points
        if point.state != "done"
    ]
    if unfinished:
        findings.append(Finding("Load points", f"not done: concurrency {'; '.join(unfinished)}"))
    return findings


def _expert_cost(balancedness: float) -> Finding:
    if balancedness > EVEN:
        return Finding("Experts", f"Balancedness {balancedness:.2f} at this point: the GPUs share the experts evenly.")
    return Finding(
        "Experts",
        f"Balancedness {balancedness:.2f} at this point: the busiest GPU of a layer typically has "
        f"{1 / balancedness:.2f} times the mean expert load. That is also the most that an even load could speed up "
        "the expert part of a step.",
    )


def _limit(rows: pd.DataFrame, best: pd.Series[Any]) -> list[Finding]:
    """What the shape of the sweep says: rising or saturated, and which part of the latency grows."""
    above = rows[rows["concurrency"] > best["concurrency"]]
    below = rows[rows["concurrency"] < best["concurrency"]]
    if above.empty and below.empty:
        return [Finding("Limit", "Unknown: with one load point there is nothing to compare.")]
    if len(above):
        step, end = best, above.iloc[0]
        text = f"Saturated: {_throughput_change(step, end)}, while E2E p50 {_change(step, end, 'e2e_p50_ms')}."
    else:
        step, end = below.iloc[-1], best
        gain = best["output_tok_s"] / step["output_tok_s"] - 1
        reached = "Not reached" if gain > STILL_RISING else "Near"
        text = f"{reached}: {_throughput_change(step, end)}, the highest concurrency tried. Add higher load points."
    start = rows.iloc[0] if above.empty else best
    return [Finding("Limit", text), *_latency_growth(start, end)]


def _latency_growth(start: pd.Series[Any], end: pd.Series[Any]) -> list[Finding]:
    """Means add up (E2E = TTFT + decode), so they say where added latency comes from."""
    added = end["e2e_mean_ms"] - start["e2e_mean_ms"]
    if not added > 0.05 * start["e2e_mean_ms"]:
        return []
    waiting = float(np.clip((end["ttft_mean_ms"] - start["ttft_mean_ms"]) / added, 0, 1))
    cause = (
        "the wait for the first token: requests queue, or prefill is the bottleneck"
        if waiting > 0.5
        else "decoding: each step takes longer as the batch grows or prefills share it"
    )
    share = max(waiting, 1 - waiting)
    return [
        Finding(
            "Latency",
            f"From concurrency {start['concurrency']:g} to {end['concurrency']:g} the mean E2E grows by "
            f"{number(added)} ms, {share:.0%} of it in {cause} "
            f"(mean TTFT {number(start['ttft_mean_ms'])} to {number(end['ttft_mean_ms'])} ms, "
            f"mean TPOT {number(start['tpot_mean_ms'])} to {number(end['tpot_mean_ms'])} ms).",
        )
    ]


def _throughput_change(start: pd.Series[Any], end: pd.Series[Any]) -> str:
    between = f"from concurrency {start['concurrency']:g} to {end['concurrency']:g}"
    return f"{between} throughput {_change(start, end, 'output_tok_s')}"


def _change(start: pd.Series[Any], end: pd.Series[Any], column: str) -> str:
    change = end[column] / start[column] - 1
    return f"{'rose' if change >= 0 else 'fell'} by {abs(change):.0%}"
