"""Figures of nodes.parquet: power over a load point, rates from counters, clocks that were held down."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.unit.analysis_run import EPOCH, make_run, node_samples
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.charts import CHARTS
from toolkit.analysis.finish import complete_sweep
from toolkit.analysis.nodes import panels, power_w, throttled
from toolkit.records.samples import HOST, NodeSample
from toolkit.records.sweep import read_sweep
from toolkit.records.tables import to_table, write_table


def frame(rows: list[NodeSample]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(NodeSample._fields))


def test_power_is_the_sum_over_gpus_of_their_means() -> None:
    samples = frame(node_samples(EPOCH, EPOCH + 10))
    expected = sum(300 + 10 * gpu + node for gpu in range(4) for node in range(2))
    assert power_w(samples, EPOCH, EPOCH + 10) == pytest.approx(expected)
    fewer = samples[~((samples["gpu"] == 0) & (samples["time"] > EPOCH + 2))]
    assert power_w(fewer, EPOCH, EPOCH + 10) == pytest.approx(expected), "a GPU sampled less often counts alike"
    assert math.isnan(power_w(samples, EPOCH + 100, EPOCH + 110))
    assert math.isnan(power_w(samples, EPOCH, math.nan))


def test_without_gpus_it_is_that_of_the_hosts() -> None:
    rows = [
        NodeSample(EPOCH + s, node, HOST, power_w=watts) for s in range(3) for node, watts in (("a", 80.0), ("b", 90.0))
    ]
    assert power_w(frame(rows), EPOCH, EPOCH + 5) == pytest.approx(170)
    unknown = [NodeSample(EPOCH + s, "a", HOST) for s in range(3)]
    assert math.isnan(power_w(frame(unknown), EPOCH, EPOCH + 5))


def test_counters_become_rates_and_a_reset_a_gap() -> None:
    counters = [0.0, 1e9, 3e9, 0.0, 2e9]
    rows = [NodeSample(EPOCH + s, "a", HOST, net_rx_bytes=value, net_tx_bytes=0.0) for s, value in enumerate(counters)]
    (panel,) = [panel for panel in panels(frame(rows)) if "network" in panel.label]
    np.testing.assert_allclose(panel.lines[0].value, [1, 2, np.nan, 2])


def test_clocks_held_down_are_told() -> None:
    found = throttled(frame(node_samples(EPOCH, EPOCH + 20)))
    assert list(found) == ["node1 GPU 2"] and 0.4 < found["node1 GPU 2"] < 0.6


def test_the_sweep_gets_its_power_and_the_chart_a_line_a_node(tmp_path: Path) -> None:
    folder = make_run(tmp_path, (1, 2))
    run = Run(folder)
    complete_sweep(run)
    sweep = read_sweep(folder)
    assert (sweep["power_w"] > 2400).all()
    assert sweep["output_tok_s_per_w"].tolist() == pytest.approx(
        (sweep["output_tok_s"] / sweep["power_w"]).tolist(), rel=1e-4
    )
    axes = CHARTS["nodes"].draw(Run(folder)).axes
    assert [len(ax.lines) for ax in axes] == [2] * len(axes) and len(axes) == 6


def test_many_nodes_are_drawn_as_a_range(tmp_path: Path) -> None:
    folder = make_run(tmp_path, (1, 2))
    rows = node_samples(EPOCH, EPOCH + 20, nodes=18)
    write_table(folder / records.NODES, to_table(NodeSample, rows))
    axes = CHARTS["nodes"].draw(Run(folder)).axes
    assert [len(ax.lines) for ax in axes] == [1] * len(axes)
