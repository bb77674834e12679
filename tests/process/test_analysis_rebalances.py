"""Rebalances and a run to compare with, from a run folder to table, sentences, charts and page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from tests.unit.analysis_run import EPOCH, make_run
from toolkit import records
from toolkit.analysis import Run, against, rebalances
from toolkit.analysis.finish import finish_run
from toolkit.records.experts import RebalanceRecord, append_rebalance, read_experts, read_rebalances, write_experts

BEGIN, END = EPOCH + 3.0, EPOCH + 3.4


def line(number: int, begin: float, end: float, **changes: object) -> RebalanceRecord:
    values: dict[str, object] = {
        "number": number, "state": "done", "reason": "", "trigger": "iterations", "t_asked": begin - 0.2,
        "t_begin": begin, "t_end": end, "plan_s": 0.01, "first_step": 40, "last_step": 44, "passes": 60,
        "assignments": 9000, "balancedness_measured": 0.6, "balancedness_before": 0.6, "balancedness_after": 0.95,
        "balancedness_bound": 1.0, "layers": 30, "replanned_layers": 3, "waiting_layers": 0, "moved_slots": 42,
        "local_copies": 4, "same_node_sends": 40, "cross_node_sends": 2, "same_node_bytes": 4_000_000,
        "cross_node_bytes": 200_000, "chunks": 2, "pauses_ms": [1.0, 2.5, 0.5], "transfers_ms": [30.0, 20.0],
    }  # fmt: skip
    return RebalanceRecord(**(values | changes))  # type: ignore[arg-type]


def rebalanced(results: Path) -> Path:
    """A run whose ranks receive evenly much from its rebalance on; a second one is given up."""
    folder = make_run(results, points=(2, 4))
    experts = read_experts(folder / records.EXPERTS)
    slots = np.take_along_axis(experts.counts, experts.placement.repeat(len(experts.counts), 0).astype(np.int64), 2)
    later = experts.times[:, 0] >= END
    slots[later] = slots[later].sum(2, keepdims=True) // slots.shape[2]
    write_experts(folder / records.EXPERTS, dataclasses.replace(experts, slot_counts=slots))
    append_rebalance(folder, line(1, BEGIN, END))
    late = float(experts.times[-3, 0])
    gone = {"state": "aborted", "reason": "rank 1 could not move experts", "balancedness_bound": float("nan")}
    append_rebalance(folder, line(2, late, late + 0.1, moved_slots=0, chunks=0, transfers_ms=[], **gone))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    plain = make_run(tmp_path_factory.mktemp("a"), points=(2, 4))
    folder = rebalanced(tmp_path_factory.mktemp("b"))
    config = yaml.safe_load((folder / records.CONFIG).read_text())
    config["compare_with"] = str(plain)
    config["engine"]["enable_eplb"] = True
    (folder / records.CONFIG).write_text(yaml.safe_dump(config))
    finish_run(folder)
    return plain, folder


def test_what_was_measured_before_and_after_is_told(both: tuple[Path, Path]) -> None:
    run = Run(both[1])
    one, two = rebalances.outcomes(run)
    assert one.before.balancedness < 0.9 < one.after.balancedness == pytest.approx(two.before.balancedness)
    assert one.after.balancedness == pytest.approx(1.0, abs=1e-3)
    assert two.record.balancedness_bound is None, "NaN is null in JSON"
    titles, rows = rebalances.table(run)
    assert [len(row) for row in rows] == [len(titles)] * 2
    assert rows[0][4] == "0.600 → 0.950" and rows[0][6].endswith("→ 1.000") and rows[1][5] == "–"
    said = " ".join(rebalances.sentences(run))
    assert "rebalanced 2 times" in said and "42 slots" in said and "2.50 ms at a time" in said
    assert "Rebalance 2 was given up: rank 1 could not move experts." in said


def test_the_report_has_the_tables_and_the_charts(both: tuple[Path, Path]) -> None:
    page = (both[1] / records.REPORT).read_text()
    assert "<h2>Rebalances of experts</h2>" in page and f"<h2>Compared with {Run(both[0]).name}</h2>" in page
    assert "engine.enable_eplb: None → True" in page and "balancedness_mean" in page
    for name in ("rebalances", "against", "balance_against"):
        pixels = imread(both[1] / records.CHARTS / f"{name}.png")
        assert (np.ptp(pixels[..., :3], axis=-1) > 0.3).sum() > 300, name


def test_the_comparison_is_of_the_loads_that_both_have(both: tuple[Path, Path]) -> None:
    found = against.differences(Run(both[1]))
    assert sorted(found["concurrency"].unique()) == [2, 4]
    balance = found[found["figure"] == "balancedness_mean"]
    assert (balance["b"] > balance["a"]).all() and (balance["verdict"] == "higher").all()


def test_a_run_to_compare_with_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    folder = make_run(tmp_path, points=(2,))
    config = yaml.safe_load((folder / records.CONFIG).read_text()) | {"compare_with": str(tmp_path / "gone")}
    (folder / records.CONFIG).write_text(yaml.safe_dump(config))
    run = Run(folder)
    assert run.baseline is None and any("compare_with: run=" in warning for warning in run.warnings)
    assert against.table(run) == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    append_rebalance(tmp_path, line(1, BEGIN, END))
    with (tmp_path / records.REBALANCES).open("ab") as out:
        out.write(b'{"number": 2, "sta')
    assert [found.number for found in read_rebalances(tmp_path)] == [1]


def test_rows_that_slots_received_are_the_load_where_they_were_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, points=(1,))
    experts = read_experts(folder / records.EXPERTS)
    slots = np.zeros((*experts.counts.shape[:2], 8), np.int64)
    slots[..., 6] = 5
    write_experts(folder / records.EXPERTS, dataclasses.replace(experts, slot_counts=slots))
    windows = Run(folder).windows
    assert windows is not None and (windows.loads_WLG == [0, 0, 0, 5]).all()
    write_experts(folder / records.EXPERTS, dataclasses.replace(experts, slot_counts=slots[:, :, :5]))
    broken = Run(folder)
    assert broken.experts is None and any("slot_counts" in warning for warning in broken.warnings)
