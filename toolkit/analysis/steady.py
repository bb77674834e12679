"""A load point over time: what was in flight, and the stretch in which it was in its steady state.

Pure. Single figures of requests: metrics.py. Read next: sweep_row.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolkit.analysis.metrics import (
    Floats,
    e2e_s,
    itl_s,
    measured,
    succeeded,
    summary_ms,
    tokens_at,
    tpot_s,
    ttft_s,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd


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
