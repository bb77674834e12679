"""The definitions of every latency and throughput figure: the only place that derives them.

Owns the formulas, from ``RequestRecord`` columns to one row of ``sweep.csv``. Pure: no files, no clocks.
Knows nothing of expert load (imbalance.py), run folders (load.py) or charts.

Where peers differ (aiperf 0.13, vLLM ``bench serve``, SGLang ``bench_serving``): our TPOT is what aiperf calls ITL
and what vLLM and SGLang call TPOT; the gap between chunks, undivided, is aiperf's ICL and vLLM's and SGLang's ITL.
Times inside are seconds; names that end in ``_ms`` are milliseconds. Percentiles are exact, linear between neighbours
(numpy's default, as aiperf's scalars, vLLM and SGLang), over the ok requests; failures are counted, never mixed in.
Read next: imbalance.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.analysis.chunks import chunks_of, each_token, gaps_of, starts
from toolkit.records.sweep import SWEEP_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def measured(requests: pd.DataFrame) -> pd.DataFrame:
    """The requests that count: all but warm-up, failed ones included."""
    warmup = requests["warmup"].astype(bool)
    return requests[~warmup] if warmup.any() else requests


def succeeded(requests: pd.DataFrame) -> pd.DataFrame:
    """The measured requests whose answer arrived whole: the only ones in latencies and token counts."""
    ok = (requests["status"] == "ok") & ~requests["warmup"].astype(bool)
    return requests if ok.all() else requests[ok]


def ttft_s(requests: pd.DataFrame) -> Floats:
    """Time to first token, one value a row: send to the first chunk that carries a token.

    A chunk that only names the role does not count (sa-bench and vLLM count any chunk with ``choices``), reasoning
    tokens do. From the send, as peers measure it, not from the scheduled time. NaN where no token came.
    """
    return requests["first_token_s"].to_numpy(np.float64)


def wait_s(requests: pd.DataFrame) -> Floats:
    """How long after it was due a request was sent, one value a row: 0 for a closed loop, which sends when it can.

    Under a request rate this is time a user waits too: a client that holds requests back (a concurrency cap) hides
    it from every figure that begins with the send ("coordinated omission").
    """
    waited: Floats = np.maximum(0.0, -requests["scheduled_s"].to_numpy(np.float64))
    return waited


def e2e_s(requests: pd.DataFrame) -> Floats:
    """End-to-end latency, one value a row: send to the last token.

    As aiperf and vLLM; SGLang measures to the last line of the stream (usage or ``[DONE]``). NaN where no token came.
    """
    return requests["last_token_s"].to_numpy(np.float64)


def tpot_s(requests: pd.DataFrame) -> Floats:
    """Time per output token after the first chunk, one value a row.

    (last_token_s - first_token_s) / (output_tokens - tokens of the first chunk). vLLM and SGLang divide by
    output_tokens - 1, which is the same when the first chunk carries one token; aiperf calls this ITL. NaN where
    all tokens came in the first chunk: there is nothing to divide.
    """
    chunks = chunks_of(requests)
    first = np.zeros(len(requests))
    at = chunks.first()
    first[chunks.owner[at]] = chunks.tokens[at]
    later = requests["output_tokens"].to_numpy(np.float64) - first
    later[later <= 0] = np.nan
    return (e2e_s(requests) - ttft_s(requests)) / later


def itl_s(requests: pd.DataFrame) -> Floats:
    """Inter-token latency, one value for each token after a request's first chunk, pooled over all rows.

    A chunk of n tokens that arrives g seconds after the one before contributes n values g / n, so that a server that
    sends several tokens a chunk (speculative decoding, stream_interval) compares with one that sends them singly.
    vLLM and SGLang pool the undivided gaps, one a chunk; aiperf's figure of this name is our TPOT.

    Raises:
        ValueError: a row whose ``chunk_s`` and ``chunk_tokens`` differ in length.
    """
    gaps = gaps_of(chunks_of(requests))
    return each_token(gaps.per_token, gaps.tokens)


def icl_s(requests: pd.DataFrame) -> Floats:
    """Inter-chunk latency: each gap between chunks that carry tokens, undivided, pooled over all rows.

    aiperf's name; vLLM and SGLang call it ITL. It grows with the tokens that a chunk carries.
    """
    gaps = gaps_of(chunks_of(requests))
    return gaps.per_token * gaps.tokens


def ttfb_s(requests: pd.DataFrame) -> Floats:
    """Time to first byte, one value a row: send to the first byte of the answer, headers included."""
    return requests["first_byte_s"].to_numpy(np.float64)


def ttfo_s(requests: pd.DataFrame) -> Floats:
    """Time to first output that a user sees, one value a row: content or a tool call, not reasoning. As aiperf."""
    return requests["first_visible_s"].to_numpy(np.float64)


def itl_at(requests: pd.DataFrame) -> tuple[Floats, Floats]:
    """When each token after a request's first chunk came (Unix seconds), and its ITL in seconds as in ``itl_s``."""
    gaps = gaps_of(chunks_of(requests))
    sent = requests["t_send"].to_numpy(np.float64)
    return each_token(sent[gaps.owner] + gaps.times, gaps.tokens), each_token(gaps.per_token, gaps.tokens)


def itl_by_request_s(requests: pd.DataFrame) -> tuple[Floats, NDArray[np.int64]]:
    """Sum of a row's ITL values and how many there are: what a bootstrap over requests needs for the mean ITL."""
    gaps = gaps_of(chunks_of(requests))
    seconds = np.bincount(gaps.owner, weights=gaps.per_token * gaps.tokens, minlength=len(requests))
    return seconds.astype(np.float64), np.bincount(gaps.owner, weights=gaps.tokens, minlength=len(requests)).astype(
        np.int64
    )


def largest_itl_s(requests: pd.DataFrame) -> Floats:
    """The longest ITL of each row, the worst stall its user saw; NaN where all tokens came in one chunk."""
    gaps = gaps_of(chunks_of(requests))
    worst = np.full(len(requests), np.nan)
    if len(gaps.owner):
        at = starts(gaps.owner)
        worst[gaps.owner[at]] = np.maximum.reduceat(gaps.per_token, at)
    return worst


def tokens_at(requests: pd.DataFrame) -> tuple[Floats, NDArray[np.int64]]:
    """When each chunk came (Unix seconds), and the tokens it carried."""
    chunks = chunks_of(requests)
    return requests["t_send"].to_numpy(np.float64)[chunks.owner] + chunks.times, chunks.tokens


def interval(requests: pd.DataFrame) -> tuple[float, float]:
    """Unix seconds of the first send and of the last token of the measured requests; NaN where there is none.

    Failed requests take part: while they were served, the server was busy with them.
    """
    rows = measured(requests[["warmup", "t_send", "last_token_s"]])
    last = rows["t_send"].to_numpy(np.float64) + e2e_s(rows)
    last = last[np.isfinite(last)]
    begin = float(rows["t_send"].min()) if len(rows) else np.nan
    return begin, float(last.max()) if len(last) else np.nan


def ended(requests: pd.DataFrame) -> Floats:
    """Unix seconds at which each row's slot was free again: last byte or failure, or the last token if unknown."""
    end = requests["end_s"].to_numpy(np.float64)
    end = np.where(np.isfinite(end), end, np.nan_to_num(e2e_s(requests), nan=0.0))
    over: Floats = requests["t_send"].to_numpy(np.float64) + end
    return over


def in_flight(requests: pd.DataFrame) -> tuple[Floats, NDArray[np.int64]]:
    """Requests in flight as steps: from ``times[i]`` (Unix seconds) on there are ``count[i]``. Warm-up counts."""
    times = np.concatenate([requests["t_send"].to_numpy(np.float64), ended(requests)])
    change = np.repeat((1, -1), len(requests))
    order = np.lexsort((change, times))  # an end before the send that replaces it
    return times[order], np.cumsum(change[order])


def held_concurrency(requests: pd.DataFrame, begin: float, end: float) -> float:
    """Time-weighted mean of the requests in flight between two Unix times; NaN for an empty stretch."""
    if not end > begin:
        return np.nan
    sent, over = requests["t_send"].to_numpy(np.float64), ended(requests)
    return float(np.clip(np.minimum(over, end) - np.maximum(sent, begin), 0, None).sum() / (end - begin))


def steady_interval(requests: pd.DataFrame, concurrency: int) -> tuple[float, float]:
    """Unix seconds between which a load point is in its steady state; NaN when it has none.

    From the first measured send, or when 95 % of ``concurrency`` are first in flight if that is later (ramp-up), to
    the first request that ends after the last send (from then on slots stay empty: the tail). It must be at least as
    long as the median request, or else it shows one wave of requests and no steady state. SGLang takes the middle of
    the run by time; aiperf and vLLM have no such window.
    """
    counted, nothing = measured(requests), (np.nan, np.nan)
    if not len(counted):
        return nothing
    times, count = in_flight(requests)
    full = np.flatnonzero(count >= 0.95 * concurrency)
    if not len(full):
        return nothing
    begin = max(float(counted["t_send"].min()), float(times[full[0]]))
    last_send, over = float(requests["t_send"].max()), ended(requests)
    end = float(over[over > last_send].min(initial=np.inf))
    typical = float(np.median(over - requests["t_send"].to_numpy(np.float64)))
    return (begin, end) if np.isfinite(end) and end - begin >= typical > 0 else nothing


def tok_s_between(requests: pd.DataFrame, begin: float, end: float) -> float:
    """Output tokens of ok requests (warm-up included: the server served them) that came in a stretch, per second."""
    if not end > begin:
        return np.nan
    times, tokens = tokens_at(requests[requests["status"] == "ok"])
    return float(tokens[(times >= begin) & (times < end)].sum() / (end - begin))


def steady_figures(requests: pd.DataFrame, concurrency: int) -> dict[str, float]:
    """The ``steady_*`` columns of a load point: its steady state without ramp-up and tail.

    - ``steady_s``, ``steady_output_tok_s``: length of ``steady_interval``, and the tokens a second that came in it.
    - ``steady_{ttft,itl,tpot,e2e}_{p50,p99}_ms``: over the ok requests that were sent in it.
    """
    begin, end = steady_interval(requests, concurrency)
    ok = succeeded(requests)
    sent = ok["t_send"].to_numpy(np.float64)
    ok = ok[(sent >= begin) & (sent < end)]
    row = {"steady_s": end - begin, "steady_output_tok_s": tok_s_between(requests, begin, end)}
    for name, seconds in (("ttft", ttft_s(ok)), ("itl", itl_s(ok)), ("tpot", tpot_s(ok)), ("e2e", e2e_s(ok))):
        found = summary_ms(seconds)
        row |= {f"steady_{name}_{stat}_ms": found[stat] for stat in ("p50", "p99")}
    return row


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good, in milliseconds; 0: not asked for.

    ``itl_ms`` bounds the longest gap of a request, ``tpot_ms`` its mean (vLLM's and SGLang's ``tpot``, aiperf's
    ``inter_token_latency``). ``ttft_ms`` and ``e2e_ms`` are those of vLLM (``ttft``, ``e2el``) and aiperf.
    """

    ttft_ms: float = 0.0
    itl_ms: float = 0.0
    tpot_ms: float = 0.0
    e2e_ms: float = 0.0

    def __bool__(self) -> bool:
        return any(bound > 0 for _, bound in self.bounds())

    def bounds(self) -> tuple[tuple[str, float], ...]:
        return ("ttft", self.ttft_ms), ("itl", self.itl_ms), ("tpot", self.tpot_ms), ("e2e", self.e2e_ms)

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()} ≤ {bound:g} ms" for name, bound in self.bounds() if bound > 0)


def keeps(requests: pd.DataFrame, slo: Slo) -> dict[str, NDArray[np.bool_]]:
    """For each bound of ``slo`` that is set: which rows keep it. A row without the figure (one token) keeps it.

    TTFT and E2E count from when the request was due (``wait_s``), where that is known.
    """
    waited = np.nan_to_num(wait_s(requests))
    kept = {}
    for name, bound in slo.bounds():
        if bound > 0:
            seconds = {"ttft": ttft_s, "itl": largest_itl_s, "tpot": tpot_s, "e2e": e2e_s}[name](requests)
            kept[name] = ~((seconds + waited if name in ("ttft", "e2e") else seconds) * 1e3 > bound)
    return kept


@dataclass(frozen=True)
class Goodput:
    """Load point against an SLO. A failed or cancelled request is not good.

    Attributes:
        req_s, tok_s: good requests, and their output tokens, per second of ``interval``.
        share: good requests / measured requests. vLLM gives ``req_s`` alone, aiperf ``req_s`` and the fraction.
        by_bound: the same share for each bound alone.
    """

    req_s: float
    tok_s: float
    share: float
    by_bound: dict[str, float]


def goodput(requests: pd.DataFrame, slo: Slo) -> Goodput:
    every, ok = measured(requests), succeeded(requests)
    begin, end = interval(requests)
    duration = end - begin if end > begin else np.nan
    kept = keeps(ok, slo)
    good = np.logical_and.reduce(list(kept.values())) if kept else np.ones(len(ok), bool)
    total = len(every) or np.nan
    return Goodput(
        req_s=float(good.sum() / duration),
        tok_s=float(ok["output_tokens"].to_numpy(np.float64)[good].sum() / duration),
        share=float(good.sum() / total),
        by_bound={name: float(rows.sum() / total) for name, rows in kept.items()},
    )


def summary_ms(seconds: Floats) -> dict[str, float]:
    """mean, p50, p90, p99 in milliseconds of the values that exist; NaN when none does."""
    values = seconds[np.isfinite(seconds)] * 1e3
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99"), np.nan)
    p50, p90, p99 = np.percentile(values, (50, 90, 99), method="linear")
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def sweep_row(
    requests: pd.DataFrame,
    concurrency: int,
    num_gpus: int,
    balancedness_mean: float = np.nan,
    imbalance_max: float = np.nan,
    request_rate: float = 0.0,
) -> dict[str, Any]:
    """One load point -> its row of ``sweep.csv``: every one of ``records.sweep.SWEEP_COLUMNS``.

    - ``requests``: measured requests; ``failed``: those of them that are not ok. Warm-up is in no figure.
    - ``duration_s``: first send to last token of the measured requests (``interval``). aiperf takes the same window;
      vLLM's and SGLang's also hold the client's work around it.
    - ``isl_mean``, ``osl_mean``: mean prompt and output tokens of the ok requests.
    - ``{ttft,itl,tpot,e2e}_{mean,p50,p90,p99}_ms``: over the ok requests; a failure is in none of them.
    - ``{ttft,e2e}_sched_*_ms``: the same from when the request was due: what to quote for a request rate.
    - ``output_tok_s``: output tokens of the ok requests / duration_s; ``total_tok_s`` adds their prompt tokens.
      Tokens of warm-up requests still in flight when the window opens are not counted, and the window holds the
      drain at its end: with few requests a slot, both figures are a little below the steady state.
    - ``output_tok_s_per_gpu``: output_tok_s / num_gpus (all GPUs of the deployment; ranks on CPU).
    - ``output_tok_s_per_user``: mean over requests of 1 / TPOT, as aiperf; others take 1000 / median TPOT.
    - ``ttfb``, ``ttfo``, ``icl``: first byte, first visible output, undivided gaps between chunks.
    - ``steady_*``: see ``steady_figures``.
    - ``balancedness_mean``, ``imbalance_max``: from the expert counts (imbalance.py), NaN until those are there;
      ``power_w``, ``output_tok_s_per_w``: from nodes.parquet (nodes.py), the same.
    - ``repeat``, ``state``, ``reason``: 0 and empty here; whoever knows the point's state fills them in.

    A figure that does not exist (no ok request, one token only) is NaN.

    Args:
        requests: rows of one load point, ``RequestRecord`` columns.
        concurrency: the load point's requests in flight.
        num_gpus: GPUs (or CPU ranks) the deployment occupies.
        request_rate: requests a second that were asked for; 0: a closed loop.
    """
    assert num_gpus > 0, num_gpus
    every, ok = measured(requests), succeeded(requests)
    begin, end = interval(requests)
    duration = end - begin
    prompt, output = float(ok["prompt_tokens"].sum()), float(ok["output_tokens"].sum())
    output_tok_s = output / duration if duration > 0 else np.nan
    tpot = tpot_s(ok)
    row: dict[str, Any] = {
        "concurrency": concurrency,
        "request_rate": request_rate,
        "requests": len(every),
        "failed": len(every) - len(ok),
        "duration_s": duration,
        "isl_mean": prompt / len(ok) if len(ok) else np.nan,
        "osl_mean": output / len(ok) if len(ok) else np.nan,
        "output_tok_s": output_tok_s,
        "output_tok_s_per_gpu": output_tok_s / num_gpus,
        "output_tok_s_per_user": float(np.mean(1 / tpot[tpot > 0])) if (tpot > 0).any() else np.nan,
        "total_tok_s": (prompt + output) / duration if duration > 0 else np.nan,
        "balancedness_mean": balancedness_mean,
        "imbalance_max": imbalance_max,
        "power_w": np.nan,
        "output_tok_s_per_w": np.nan,
        "repeat": 0,
        "state": "",
        "reason": "",
    } | steady_figures(requests, concurrency)
    ttft, e2e, waited = ttft_s(ok), e2e_s(ok), wait_s(ok)
    latencies = {"ttft": ttft, "itl": itl_s(ok), "tpot": tpot, "e2e": e2e}
    latencies |= {"ttft_sched": ttft + waited, "e2e_sched": e2e + waited}
    latencies |= {"ttfb": ttfb_s(ok), "ttfo": ttfo_s(ok), "icl": icl_s(ok)}
    for name, seconds in latencies.items():
        row |= {f"{name}_{stat}_ms": value for stat, value in summary_ms(seconds).items()}
    return {name: row[name] for name in SWEEP_COLUMNS}
