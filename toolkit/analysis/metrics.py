"""The definitions of every latency figure of requests: the only place that derives them.

Owns the formulas over ``RequestRecord`` columns. Pure: no files, no clocks. A load point over time is steady.py's, its
objectives goodput.py's, its row of ``sweep.csv`` sweep_row.py's.
Knows nothing of expert load (imbalance.py), run folders (load.py) or charts.

Where peers differ (aiperf 0.13, vLLM ``bench serve``, SGLang ``bench_serving``): our TPOT is what aiperf calls ITL
and what vLLM and SGLang call TPOT; the gap between chunks, undivided, is aiperf's ICL and vLLM's and SGLang's ITL.
Times inside are seconds; names that end in ``_ms`` are milliseconds. Percentiles are exact, linear between neighbours
(numpy's default, as aiperf's scalars, vLLM and SGLang), over the ok requests; failures are counted, never mixed in.
Read next: steady.py, sweep_row.py, imbalance.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolkit.analysis.chunks import chunks_of, each_token, gaps_of, starts
from toolkit.records.requests import NOT_FAILED

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def measured(requests: pd.DataFrame) -> pd.DataFrame:
    """The requests that count: all but warm-up, failed ones included."""
    warmup = requests["warmup"].astype(bool)
    return requests[~warmup] if warmup.any() else requests


def failed(requests: pd.DataFrame) -> pd.DataFrame:
    """The measured requests that failed; neither those given up as asked nor those that ended with their point."""
    every = measured(requests)
    return every[~every["status"].isin(NOT_FAILED)]


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


def summary_ms(seconds: Floats) -> dict[str, float]:
    """mean, p50, p90, p99 in milliseconds of the values that exist; NaN when none does."""
    values = seconds[np.isfinite(seconds)] * 1e3
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99"), np.nan)
    p50, p90, p99 = np.percentile(values, (50, 90, 99), method="linear")
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
