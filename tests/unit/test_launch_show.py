"""The plan in words: what the load will be."""

from __future__ import annotations

import pytest

from toolkit.config.load import LoadConfig
from toolkit.launch.show import _points


@pytest.mark.parametrize(
    ("load", "text"),
    [
        (LoadConfig(concurrency=[1, 8]), "load points 1, 8 (concurrency)"),
        (LoadConfig(request_rate=[0.5, 4.0], arrival="gamma"), "load points 0.5, 4 (requests/s, gamma)"),
        (LoadConfig(arrival="trace", dataset_path="t.jsonl", speedup=2.5), "the trace t.jsonl, 2.5 times as fast as"),
    ],
)
def test_what_the_load_will_be(load: LoadConfig, text: str) -> None:
    assert _points(load).startswith(text)
