"""One load point -> its row of ``sweep.csv``. Pure. The formulas: metrics.py, steady.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.analysis.metrics import (
    e2e_s,
    failed,
    icl_s,
    interval,
    itl_s,
    measured,
    succeeded,
    summary_ms,
    tpot_s,
    ttfb_s,
    ttfo_s,
    ttft_s,
    wait_s,
)  # fmt: skip
from toolkit.analysis.steady import steady_figures
from toolkit.records.sweep import SWEEP_COLUMNS

if TYPE_CHECKING:
    import pandas as pd


def counts(requests: pd.DataFrame) -> dict[str, int]:
    """How the measured requests of a load point ended: ``requests``, and of them ``failed`` and ``cancelled``.

    The others are ok. ``cancelled``: the client gave them up as it was asked to, which says nothing of the server
    (aiperf counts them among its errors). Requests that ended with a point that was cut off are in none of the three.
    """
    ok, bad = len(succeeded(requests)), len(failed(requests))
    cancelled = int((measured(requests)["status"] == "cancelled").sum())
    return {"requests": ok + bad + cancelled, "failed": bad, "cancelled": cancelled}


def sweep_row(
    requests: pd.DataFrame,
    concurrency: int,
    num_gpus: int,
    balancedness_mean: float = np.nan,
    imbalance_max: float = np.nan,
    request_rate: float = 0.0,
) -> dict[str, Any]:
    """One load point -> its row of ``sweep.csv``: every one of ``records.sweep.SWEEP_COLUMNS``.

    - ``requests``, ``failed``, ``cancelled``: see ``counts``. Warm-up is in no figure.
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
    ok = succeeded(requests)
    begin, end = interval(requests)
    duration = end - begin
    prompt, output = float(ok["prompt_tokens"].sum()), float(ok["output_tokens"].sum())
    output_tok_s = output / duration if duration > 0 else np.nan
    tpot = tpot_s(ok)
    row: dict[str, Any] = (
        counts(requests)
        | {
            "concurrency": concurrency,
            "request_rate": request_rate,
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
        }
        | steady_figures(requests, concurrency)
    )
    ttft, e2e, waited = ttft_s(ok), e2e_s(ok), wait_s(ok)
    latencies = {"ttft": ttft, "itl": itl_s(ok), "tpot": tpot, "e2e": e2e}
    latencies |= {"ttft_sched": ttft + waited, "e2e_sched": e2e + waited}
    latencies |= {"ttfb": ttfb_s(ok), "ttfo": ttfo_s(ok), "icl": icl_s(ok)}
    for name, seconds in latencies.items():
        row |= {f"{name}_{stat}_ms": value for stat, value in summary_ms(seconds).items()}
    return {name: row[name] for name in SWEEP_COLUMNS}
