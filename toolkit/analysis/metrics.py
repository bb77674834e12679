"""The definitions of every latency and throughput figure: the only place that derives them.

Owns the formulas, from ``records.RequestRecord`` columns to one row of ``sweep.csv``. Pure: no files, no clocks.
Knows nothing of expert load (imbalance.py), run folders (load.py) or charts.

Where peers differ (aiperf 0.13, vLLM ``bench serve``, SGLang ``bench_serving``): our TPOT is what aiperf calls ITL
and what vLLM and SGLang call TPOT; the gap between chunks, undivided, is aiperf's ICL and vLLM's and SGLang's ITL.
Times inside are seconds; names that end in ``_ms`` are milliseconds. Percentiles are exact (numpy, linear).
Read next: imbalance.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.records import SWEEP_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def measured(requests: pd.DataFrame) -> pd.DataFrame:
    """The requests that count: all but warm-up, failed ones included."""
    return requests[~requests["warmup"].astype(bool)]


def succeeded(requests: pd.DataFrame) -> pd.DataFrame:
    """The measured requests whose answer arrived whole: the only ones in latencies and token counts."""
    rows = measured(requests)
    return rows[rows["status"] == "ok"]


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
    first = np.array([_first(tokens) for tokens in requests["chunk_tokens"]], dtype=np.float64)
    later = requests["output_tokens"].to_numpy(np.float64) - first
    later[later <= 0] = np.nan
    return (e2e_s(requests) - ttft_s(requests)) / later


def itl_s(requests: pd.DataFrame) -> Floats:
    """Inter-token latency, one value for each token after a request's first chunk, pooled over all rows.

    A chunk of n tokens that arrives g seconds after the one before contributes n values g / n, so that a server that
    sends several tokens a chunk (speculative decoding, stream_interval) compares with one that sends them singly.
    vLLM and SGLang pool the undivided gaps, one a chunk; aiperf's figure of this name is our TPOT.
    """
    lengths = requests["chunk_s"].map(len).to_numpy(np.int64)
    if not lengths.sum():
        return np.empty(0)
    unequal = lengths != requests["chunk_tokens"].map(len).to_numpy(np.int64)
    if unequal.any():
        rid = requests["request_id"].to_numpy()[unequal][0]
        raise ValueError(f"request_id={rid}: chunk_s and chunk_tokens differ in length; each chunk needs both")
    times = np.concatenate([np.asarray(chunk, np.float64) for chunk in requests["chunk_s"]])
    tokens = np.concatenate([np.asarray(chunk, np.int64) for chunk in requests["chunk_tokens"]])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    carries = tokens > 0
    times, tokens, owner = times[carries], tokens[carries], owner[carries]
    same_request = owner[1:] == owner[:-1]
    gaps, tokens = np.diff(times)[same_request], tokens[1:][same_request]
    per_token: Floats = gaps / tokens
    return np.repeat(per_token, tokens)


def good(requests: pd.DataFrame, ttft_ms: float = 0.0, tpot_ms: float = 0.0, e2e_ms: float = 0.0) -> NDArray[np.bool_]:
    """Which rows are ok and meet every objective that is not 0; goodput counts these. A failed one meets none.

    TTFT and E2E count from when the request was due (``wait_s``). A row without TPOT (one chunk) has met its objective.
    """
    waited = wait_s(requests)
    meets = (requests["status"] == "ok").to_numpy(np.bool_)
    for limit, seconds in ((ttft_ms, ttft_s(requests) + waited), (e2e_ms, e2e_s(requests) + waited)):
        if limit:
            meets = meets & (seconds * 1e3 <= limit)
    if tpot_ms:
        meets = meets & ~(tpot_s(requests) * 1e3 > tpot_ms)
    return meets


def interval(requests: pd.DataFrame) -> tuple[float, float]:
    """Unix seconds of the first send and of the last token of the measured requests; NaN where there is none.

    Failed requests take part: while they were served, the server was busy with them.
    """
    rows = measured(requests)
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


def sweep_row(
    requests: pd.DataFrame,
    concurrency: int,
    num_gpus: int,
    balancedness_mean: float = np.nan,
    imbalance_max: float = np.nan,
    request_rate: float = 0.0,
) -> dict[str, Any]:
    """One load point -> its row of ``sweep.csv``: every one of ``records.SWEEP_COLUMNS``.

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
    - ``balancedness_mean``, ``imbalance_max``: from the expert counts (imbalance.py), NaN until those are there.

    A figure that does not exist (no ok request, one token only) is NaN.

    Args:
        requests: rows of one load point, ``records.RequestRecord`` columns.
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
    }
    ttft, e2e, waited = ttft_s(ok), e2e_s(ok), wait_s(ok)
    latencies = {"ttft": ttft, "itl": itl_s(ok), "tpot": tpot, "e2e": e2e}
    latencies |= {"ttft_sched": ttft + waited, "e2e_sched": e2e + waited}
    for name, seconds in latencies.items():
        row |= {f"{name}_{stat}_ms": value for stat, value in summary_ms(seconds).items()}
    return {name: row[name] for name in SWEEP_COLUMNS}


def _first(tokens: Any) -> int:
    """Tokens of the first chunk that carries any."""
    return next((int(count) for count in tokens if count > 0), 0)
