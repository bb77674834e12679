"""What a server said of itself in ``/metrics``, under one set of names whichever server it was.

Owns the table of names; ours and those of SGLang, vLLM, TensorRT-LLM and Dynamo. Series of one name (a DP rank or
engine each) are added up, of KV use the fullest counts. A counter becomes a rate between two scrapes; a counter that
falls was reset by a restart, and the gap stays empty. Read next: charts/server.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from toolkit.analysis.load import Run

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """One figure: its title with unit, how series of one scrape become one value, and its names, best first.

    ``names``: sample name -> factor to the unit.
    """

    key: str
    title: str
    combine: Literal["sum", "max"]
    rate: bool
    names: dict[str, float]


FIGURES: tuple[Figure, ...] = (
    Figure("running", "requests\nrunning", "sum", False, {
        "wideep:num_running_reqs": 1, "sglang:num_running_reqs": 1, "vllm:num_requests_running": 1,
        "trtllm_num_requests_running": 1, "dynamo_frontend_inflight_requests": 1,
    }),
    Figure("waiting", "requests\nwaiting", "sum", False, {
        "wideep:num_queue_reqs": 1, "sglang:num_queue_reqs": 1, "vllm:num_requests_waiting": 1,
        "trtllm_num_requests_waiting": 1, "dynamo_frontend_queued_requests": 1,
    }),
    Figure("kv_use", "KV use,\nfullest (%)", "max", False, {
        "wideep:token_usage": 100, "sglang:token_usage": 100, "vllm:kv_cache_usage_perc": 100,
        "vllm:gpu_cache_usage_perc": 100, "trtllm_kv_cache_utilization": 100,
        "dynamo_component_kvstats_gpu_cache_usage_percent": 100,
    }),
    Figure("generated", "generated\ntok/s", "sum", True, {
        "wideep:generation_tokens_total": 1, "sglang:generation_tokens_total": 1, "vllm:generation_tokens_total": 1,
        "dynamo_frontend_output_tokens_total": 1, "dynamo_frontend_output_sequence_tokens_sum": 1,
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One figure of one server over time: Unix seconds, values."""

    figure: Figure
    url: str
    name: str
    times: Floats
    values: Floats


def series(run: Run) -> list[Series]:
    """Every figure of every server that was scraped, in the order of ``FIGURES``; of its names, the first there is."""
    samples = run.server_metrics
    found = []
    for figure in FIGURES:
        known = samples[samples["name"].isin(list(figure.names))]
        for url, of_server in known.groupby("url", sort=True):
            name = next(name for name in figure.names if (of_server["name"] == name).any())
            one = of_server[of_server["name"] == name]
            times, values = _rates(one) if figure.rate else _levels(one, figure.combine)
            found.append(Series(figure, str(url), name, times, values * figure.names[name]))
    return found


def _levels(samples: pd.DataFrame, combine: str) -> tuple[Floats, Floats]:
    grouped = samples.groupby("time", sort=True)["value"]
    one = grouped.sum() if combine == "sum" else grouped.max()
    return one.index.to_numpy(np.float64), one.to_numpy(np.float64)


def _rates(samples: pd.DataFrame) -> tuple[Floats, Floats]:
    """A second's growth between scrapes, each series by itself; NaN where one fell."""
    table = samples.pivot_table(index="time", columns="labels", values="value", aggfunc="sum").sort_index()
    times = table.index.to_numpy(np.float64)
    grown = table.diff().iloc[1:]
    total = grown.sum(axis=1, min_count=1).to_numpy(np.float64, copy=True)
    total[(grown < 0).any(axis=1).to_numpy()] = np.nan
    return times[1:], total / np.diff(times)
