"""Objectives of latency, and which requests keep them. Pure. The latencies themselves: metrics.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolkit.analysis.metrics import (
    e2e_s,
    failed,
    interval,
    largest_itl_s,
    succeeded,
    tpot_s,
    ttft_s,
    wait_s,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd


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
    """Load point against an SLO. A failed request is not good; one that the client gave up as asked is not judged.

    Attributes:
        req_s, tok_s: good requests, and their output tokens, per second of ``interval``.
        share: good requests / (ok + failed requests). vLLM gives ``req_s`` alone, aiperf ``req_s`` and the fraction.
        by_bound: the same share for each bound alone.
    """

    req_s: float
    tok_s: float
    share: float
    by_bound: dict[str, float]


def goodput(requests: pd.DataFrame, slo: Slo) -> Goodput:
    ok = succeeded(requests)
    begin, end = interval(requests)
    duration = end - begin if end > begin else np.nan
    kept = keeps(ok, slo)
    good = np.logical_and.reduce(list(kept.values())) if kept else np.ones(len(ok), bool)
    total = len(ok) + len(failed(requests)) or np.nan
    return Goodput(
        req_s=float(good.sum() / duration),
        tok_s=float(ok["output_tokens"].to_numpy(np.float64)[good].sum() / duration),
        share=float(good.sum() / total),
        by_bound={name: float(rows.sum() / total) for name, rows in kept.items()},
    )
