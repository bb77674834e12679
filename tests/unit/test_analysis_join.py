"""The join of imbalance and latency against a server whose passes wait a known time for the busiest GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.unit.analysis_run import EPOCH, make_run, skewed_experts, skewed_steps
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.charts.experts import placements
from toolkit.analysis.join import losses, moments, passes, point_loss, with_passes
from toolkit.analysis.stats import Estimate
from toolkit.analysis.timeline import timeline
from toolkit.analysis.traffic import cross_node
from toolkit.records.experts import read_experts, write_experts
from toolkit.records.files import write_json
from toolkit.records.requests import read_requests
from toolkit.records.steps import StepRecord, steps_path
from toolkit.records.streams import open_rows

HELD_MS = 0.02  # a pass, for each assignment above the mean


def write_steps(folder: Path, rows: list[StepRecord]) -> None:
    with open_rows(steps_path(folder, 0), StepRecord) as write:
        write(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One long load point, so that it has a model of its own; every other window is twice as skewed."""
    folder = make_run(tmp_path_factory.mktemp("results"), points=(8,), requests_per_slot=30)
    requests = read_requests(folder)
    end = float((requests["t_send"] + requests["end_s"]).max())
    rng = np.random.default_rng(11)
    experts = skewed_experts(rng, EPOCH, end)
    counts = experts.counts.copy()
    counts[::2, :, 0] *= 3
    experts = dataclasses.replace(experts, counts=counts)
    write_experts(folder / records.EXPERTS, experts)
    write_steps(folder, skewed_steps(rng, EPOCH, end, experts, HELD_MS))
    return folder


def test_the_model_finds_the_time_that_the_busiest_gpu_costs(folder: Path) -> None:
    run = Run(folder)
    (loss,) = losses(run)
    frame = with_passes(moments(run))
    true = HELD_MS * float(np.average(frame["excess"], weights=frame["passes"]))
    assert loss.own_fit and loss.certain and loss.held_ms is not None
    assert loss.held_ms.low <= true <= loss.held_ms.high
    assert loss.held_ms.value == pytest.approx(true, rel=0.15)
    assert loss.step_correlation > 0.5 and loss.explained > 0.9
    dear, cheap = (dataclasses.replace(loss, ceiling_ms=Estimate(x, x, x)) for x in (50.0, 0.5))  # all of experts' work
    assert f"holds the others for {loss.held_ms.value:.2g} ms (" in dear.sentence()
    assert "holds the others for 0.5 ms at most of each" in cheap.sentence()


def test_no_cost_is_claimed_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    run = Run(folder)
    frame = moments(run)
    rng = np.random.default_rng(4)
    frame["step_ms"] = 20 + 0.4 * frame["tokens"] + rng.normal(0, 0.3, len(frame))
    loss = point_loss(frame, 8)
    assert loss.held_ms is not None and loss.held_ms.low < 0 < loss.held_ms.high
    assert "can be told from noise: at most" in loss.sentence()
    frame["excess"] = frame["tokens"] * (1 + rng.normal(0, 1e-4, len(frame)))  # cannot be told from the batch size
    frame["busiest"] = 2 * frame["excess"]
    tied = point_loss(frame, 8)
    assert tied.held_ms is not None and tied.ceiling_ms is not None
    assert tied.held_ms.high > tied.step_ms > tied.ceiling_ms.high > 0
    assert f"at most {tied.ceiling_ms.high:.2g} ms" in tied.sentence()


def test_few_moments_borrow_the_fit_of_all_points_or_say_nothing(folder: Path) -> None:
    frame = moments(Run(folder))
    few = point_loss(frame.head(5), 8, frame)
    assert not few.own_fit and few.held_ms is not None and "fitted over all load points" in few.sentence()
    assert point_loss(frame.head(5), 8).held_ms is None
    assert "too few or too like" in point_loss(frame.head(5), 8).sentence()


def test_a_moment_holds_the_passes_and_tokens_of_its_own_time(folder: Path) -> None:
    run = Run(folder)
    frame, worker = moments(run), passes(run.steps)
    for _, row in frame.iloc[[1, 20, -2]].iterrows():
        inside = worker[(worker["t_mid"] >= row["begin"]) & (worker["t_mid"] < row["end"])]
        assert row["passes"] == len(inside) > 0
        assert row["step_ms"] == pytest.approx(inside["step_ms"].mean())
        came = [
            gap * 1e3
            for _, r in run.requests[run.requests["status"] == "ok"].iterrows()
            for gap, at in zip(np.diff(list(r["chunk_s"])), np.array(list(r["chunk_s"]))[1:] + r["t_send"])
            if row["begin"] <= at < row["end"]
        ]
        assert row["itl_tokens"] == len(came)
        assert row["itl_ms"] == pytest.approx(np.mean(came))


def test_a_pass_is_as_long_as_its_slowest_rank() -> None:
    def step(rank: int, duration: float, tokens: int) -> StepRecord:
        return StepRecord(3, 10.0 + rank, duration, rank, tokens, tokens, 0, 1, 0, 0, 64, 0)

    worker = passes(pd.DataFrame([step(0, 0.5, 8), step(1, 0.2, 2)], columns=list(StepRecord._fields)))
    assert worker.iloc[0].to_dict() == pytest.approx(
        {"step": 3, "t_mid": 10.25, "step_ms": 500, "tokens": 10, "prefill_tokens": 0, "dp_excess": 3}
    )


def test_a_rebalance_shows_before_and_after(folder: Path, tmp_path: Path) -> None:
    experts = read_experts(folder / records.EXPERTS)
    layers, slots = experts.placement.shape[1:]
    middle = float(experts.times[len(experts.times) // 2, 0])
    even = np.stack([np.argsort(np.argsort(-experts.counts.sum(0)[layer])) for layer in range(layers)])
    order = np.argsort([i // 4 if i % 2 == 0 else 3 - i // 4 for i in range(slots)], kind="stable")
    better = np.empty_like(experts.placement[0])
    for layer in range(layers):
        better[layer, order] = np.argsort(even[layer])
    run = Run(make_run(tmp_path, points=(2,), requests_per_slot=2))
    write_experts(
        run.path / records.EXPERTS,
        dataclasses.replace(
            experts,
            placement=np.stack([experts.placement[0], better]),
            placement_times=np.array([EPOCH - 10, middle]),
        ),
    )
    run = Run(run.path)
    titles = [title for title, _ in placements(run)]
    assert titles == ["first", "rebalance 1"]
    assert sum(part.windows for _, part in placements(run)) == len(experts.times)


def test_the_timeline_adds_up(folder: Path) -> None:
    run = Run(folder)
    data = timeline(run, bins=50)
    assert (data.output_tok_s * data.bin_s).sum() == pytest.approx(run.requests["output_tokens"].sum())
    alive = run.requests["end_s"].sum()
    assert (data.in_flight * data.bin_s).sum() == pytest.approx(alive)
    assert data.failures.sum() == (run.requests["status"] != "ok").sum() == 1
    assert data.given_up.sum() == 0
    inside = run.steps["t_begin"].between(data.edges[0], data.edges[-1])
    assert data.preemptions.sum() == run.steps[inside]["preemptions"].sum() > 0
    assert data.running.shape == (4, 50)
    (phase,) = data.phases
    assert phase.begin < phase.steady[0] < phase.steady[1] < phase.end


def test_traffic_that_crosses_nodes(folder: Path) -> None:
    shares = cross_node(Run(folder))
    assert shares["concurrency"].tolist() == [8]
    assert shares["share"].iloc[0] == pytest.approx(
        0.5, abs=0.05
    )  # tokens are even over two nodes: half, whatever the load


def test_one_node_has_no_crossing(tmp_path: Path) -> None:
    folder = make_run(tmp_path, points=(1,), requests_per_slot=2)
    write_json(
        folder / records.PLAN,
        {"workers": [{"ranks": [{"dp_rank": r, "ep_rank": r, "node": 0} for r in range(4)]}]},
    )
    with pytest.raises(ValueError, match="one node"):
        cross_node(Run(folder))


def test_without_steps_or_counts_there_are_no_losses_and_no_crash(tmp_path: Path) -> None:
    folder = make_run(tmp_path, points=(1,), requests_per_slot=2)
    steps_path(folder, 0).unlink()
    assert losses(Run(folder)) == []
    assert len(moments(Run(folder))) > 0
    (folder / records.EXPERTS).unlink()
    assert moments(Run(folder)).empty and losses(Run(folder)) == []
