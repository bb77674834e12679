"""A server's own metrics under one set of names: sums over ranks, rates of counters, restarts, servers of others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.analysis_run import EPOCH, make_run
from toolkit.analysis import Run
from toolkit.analysis.charts import CHARTS
from toolkit.analysis.server import Series, series
from toolkit.records.samples import MetricSample, write_server_metrics


def sample(second: float, name: str, value: float, rank: int = 0, url: str = "http://n1:8000/metrics") -> MetricSample:
    return MetricSample(EPOCH + second, url, name, json.dumps({"dp_rank": str(rank)}), value)


def found(folder: Path, samples: list[MetricSample]) -> dict[str, Series]:
    write_server_metrics(folder, samples)
    return {one.figure.key: one for one in series(Run(folder))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_ranks_are_added_up_and_of_kv_use_the_fullest_counts(folder: Path) -> None:
    samples = [sample(s, "wideep:num_running_reqs", 3 + s, rank) for s in (0, 1) for rank in (0, 1)]
    samples += [sample(0, "wideep:token_usage", use, rank) for rank, use in enumerate((0.25, 0.5))]
    both = found(folder, samples)
    assert both["running"].values.tolist() == [6, 8]
    assert both["kv_use"].values.tolist() == [50]


def test_a_counter_becomes_a_rate_and_a_restart_a_gap(folder: Path) -> None:
    counts = {0: (100, 10), 2: (300, 30), 4: (5, 50), 5: (15, 60)}
    samples = [
        sample(s, "vllm:generation_tokens_total", value, rank)
        for s, values in counts.items()
        for rank, value in enumerate(values)
    ]
    rates = found(folder, samples)["generated"]
    assert rates.times.tolist() == [EPOCH + 2, EPOCH + 4, EPOCH + 5]
    np.testing.assert_array_equal(rates.values, [110, np.nan, 20])


def test_each_servers_best_name_is_taken(folder: Path) -> None:
    samples = [sample(0, "vllm:gpu_cache_usage_perc", 0.9), sample(0, "vllm:kv_cache_usage_perc", 0.4)]
    assert found(folder, samples)["kv_use"].name == "vllm:kv_cache_usage_perc"


def test_the_chart(folder: Path) -> None:
    with pytest.raises(ValueError, match="no /metrics of a server that is known"):
        CHARTS["server_metrics"].draw(Run(folder))
    names = ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage", "sglang:generation_tokens_total")
    samples = [
        sample(s, name, s / 20, url=url) for s in range(20) for name in names for url in ("http://a/", "http://b/")
    ]
    write_server_metrics(folder, samples)
    figure = CHARTS["server_metrics"].draw(Run(folder))
    panels = figure.axes
    assert [ax.get_ylabel().replace("\n", " ") for ax in panels] == [
        "requests running", "requests waiting", "KV use, fullest (%)", "generated tok/s",
    ]  # fmt: skip
    assert [len(ax.get_legend().get_texts()) for ax in panels] == [2, 2, 2, 2], "a line a server"
    assert "a" in panels[0].get_legend().get_texts()[0].get_text()
