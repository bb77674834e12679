"""The recorder on one rank: pairs of experts, padding, windows, modes, files; against counts by hand."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit import records
from toolkit.config.engine import EngineConfig
from toolkit.engine.core import Batch, Request, SamplingParams, ScheduledRequest
from toolkit.engine.eplb import formats, history
from toolkit.engine.eplb.history import History
from toolkit.engine.eplb.passes import PassLog
from toolkit.engine.eplb.placement import Placement
from toolkit.engine.eplb.recorder import Recorder
from toolkit.engine.eplb.windows import Summed, halved
from toolkit.engine.parallel import Groups
from toolkit.records.experts import ExpertCounts, read_experts, write_experts

EXPERTS, SLOTS = 4, 6
FIRST, OTHER = torch.tensor([[0, 1], [1, 0], [2, 3], [-1, -1], [3, -1]]), torch.tensor([[0, 3]])


def recorder(folder: Path, window: int = 2, **options: Any) -> Recorder:
    """Layer 5 of a model, alone on one rank."""
    phy2log = np.array([[0, 1, 2, 3, 0, 1]])
    placement = Placement(phy2log, EXPERTS, 0, 1, "cpu", algorithm="dynamic")
    history = History((5,), EXPERTS, Groups.single().counts, 0, 1, phy2log, folder / records.EXPERTS)
    return Recorder(1, placement, True, window, history, "cpu", **options)


def one_pass(made: Recorder, ids: torch.Tensor, batch: Batch | None = None) -> torch.Tensor:
    """What a layer does with the recorder in a pass; the slots of its tokens."""
    made.begin_pass(batch or Batch())
    slots = made.placement.to_slots(0, ids)
    made.selected(0, ids, slots)
    made.received(0, torch.bincount(slots[slots >= 0], minlength=SLOTS))
    made.end_of_pass()
    return slots


def test_pairs_of_the_first_pass_of_a_window_are_counted_and_padding_is_not(tmp_path: Path) -> None:
    made = recorder(tmp_path, pairs_every=1)
    for ids in (FIRST, OTHER, FIRST):
        one_pass(made, ids)
    made.flush()
    pairs = read_experts(tmp_path / records.EXPERTS).pairs
    assert pairs is not None
    assert pairs[0].tolist() == [[0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]]


def test_pairs_are_a_sample_of_the_windows(tmp_path: Path) -> None:
    made = recorder(tmp_path, window=1, pairs_every=2)
    for ids in (FIRST, OTHER, OTHER, FIRST):
        one_pass(made, ids)
    made.flush()
    pairs = read_experts(tmp_path / records.EXPERTS).pairs
    assert pairs is not None and pairs[0, 0].tolist() == [0, 2, 0, 1], "passes 0 and 2"


@pytest.mark.parametrize("by_ids", [True, False], ids=["stat", "stat_approx"])
def test_both_sources_count_the_same_experts_and_the_slots_that_got_them(tmp_path: Path, by_ids: bool) -> None:
    made = recorder(tmp_path, by_ids=by_ids)
    seen: list[Summed] = []
    made.history.listen = seen.append
    slots = [one_pass(made, ids) for ids in (FIRST, OTHER, FIRST)]
    made.flush()
    found = read_experts(tmp_path / records.EXPERTS)
    assert found.counts[:, 0].tolist() == [[3, 2, 1, 3], [2, 2, 1, 2]], "two windows: of two passes, and the rest"
    chosen = torch.cat([s.flatten() for s in slots])
    assert found.slot_counts is not None
    assert found.slot_counts.sum((0, 1)).tolist() == torch.bincount(chosen[chosen >= 0], minlength=SLOTS).tolist()
    assert [window.passes for window in seen] == [2, 1]


def test_what_comes_while_it_is_stopped_is_thrown_away(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    one_pass(made, OTHER)
    made.stop()
    one_pass(made, FIRST)
    made.start()
    one_pass(made, OTHER)
    made.flush()
    found = read_experts(tmp_path / records.EXPERTS)
    assert found.counts.sum(0)[0].tolist() == [2, 0, 0, 2] and len(found.counts) == 2


def test_a_stat_dump_is_sglangs(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    for ids in (FIRST, OTHER, FIRST):
        one_pass(made, ids)
    name = made.dump()
    assert name.startswith("expert_dumps/expert_distribution_recorder_") and name.endswith(".pt")
    counts = formats.read_counts(tmp_path / name)
    assert counts.counts_WLE.shape == (2, 6, EXPERTS), "a row for each of the model's layers"
    assert counts.load_LE[5].tolist() == [5, 4, 2, 5] and not counts.load_LE[:5].any()
    content = torch.load(tmp_path / name, weights_only=True)
    assert content["rank"] == 0 and 0 < content["average_utilization_rate_over_window"] <= 1


def test_a_dump_of_a_server_that_saw_nothing(tmp_path: Path) -> None:
    counts = formats.read_counts(tmp_path / recorder(tmp_path).dump())
    assert counts.counts_WLE.shape == (1, 6, EXPERTS) and not counts.counts_WLE.any()


def test_a_dump_of_what_ended_since(tmp_path: Path) -> None:
    made = recorder(tmp_path, window=1)
    one_pass(made, FIRST)
    made.flush()
    since = time.time()
    one_pass(made, OTHER)
    counts = formats.read_counts(tmp_path / made.dump(since))
    assert counts.load_LE[5].tolist() == [1, 0, 0, 1]
    assert formats.read_counts(tmp_path / made.dump()).load_LE[5].tolist() == [3, 2, 1, 3], "nothing is forgotten"
    assert not formats.read_counts(tmp_path / made.dump(time.time())).counts_WLE.any()
    assert len(read_experts(tmp_path / records.EXPERTS).counts) == 2


def test_windows_of_two_runs_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run's end is a flush, after an odd number of windows."""
    monkeypatch.setattr(history, "MAX_WINDOWS", 8)
    made, moments = recorder(tmp_path, window=1), [0.0]
    for ids in (FIRST, OTHER):
        for _ in range(11):
            one_pass(made, ids)
        made.flush()
        moments.append(time.time())
    assert formats.read_counts(tmp_path / made.dump(moments[1])).load_LE[5].tolist() == [11, 0, 0, 11]
    found = read_experts(tmp_path / records.EXPERTS)
    assert found.counts.sum((0, 1)).tolist() == [33, 22, 11, 33] and len(found.counts) < 9


def test_neighbours_are_merged_two_by_two_but_not_over_a_moment_that_was_asked_for() -> None:
    windows = [Summed(np.full((1, 1), 1 << i), np.zeros((1, 1), np.int64), i, i + 1.0, 1) for i in range(6)]
    assert [int(w.counts_LE.sum()) for w in halved(windows, set())] == [3, 12, 48]
    assert [int(w.counts_LE.sum()) for w in halved(windows, {3.0, 4.0})] == [3, 4, 8, 48]


def test_a_process_that_is_started_anew_goes_on_with_what_the_one_before_left(tmp_path: Path) -> None:
    before = recorder(tmp_path, window=1, pairs_every=1)
    one_pass(before, FIRST)
    before.flush()
    left = read_experts(tmp_path / records.EXPERTS)
    after = recorder(tmp_path, window=1, pairs_every=1)
    assert read_experts(tmp_path / records.EXPERTS).counts.tolist() == left.counts.tolist(), "not emptied at its start"
    one_pass(after, OTHER)
    whole = formats.read_counts(tmp_path / after.dump())
    found = read_experts(tmp_path / records.EXPERTS)
    assert found.counts[:, 0].tolist() == [[2, 2, 1, 2], [1, 0, 0, 1]]
    assert found.times[0].tolist() == left.times[0].tolist() and found.times[0, 1] <= found.times[1, 0]
    assert found.placement_times[0] == left.placement_times[0] < found.placement_times[1]
    assert found.slot_counts is not None and found.slot_counts.sum((1, 2)).tolist() == [7, 2]
    assert found.pairs is not None and found.pairs[0, 0].tolist() == [0, 2, 0, 1]
    assert whole.load_LE[5].tolist() == [3, 2, 1, 3]
    after.flush()
    pairs = read_experts(tmp_path / records.EXPERTS).pairs
    assert pairs is not None and pairs[0, 0].tolist() == [0, 2, 0, 1], "not added twice"


@pytest.mark.parametrize("kind", ["other slots", "no file of ours"])
def test_what_a_process_cannot_go_on_with_is_put_aside(tmp_path: Path, kind: str) -> None:
    path = tmp_path / records.EXPERTS
    made = recorder(tmp_path)
    one_pass(made, FIRST)
    made.flush()
    found = read_experts(path)
    if kind == "other slots":
        write_experts(path, dataclasses.replace(found, placement=found.placement[:, :, :4]))
    else:
        path.write_bytes(b"half a file")
    content = path.read_bytes()
    again = recorder(tmp_path)
    assert path.with_name("experts.1.npz").read_bytes() == content
    one_pass(again, OTHER)
    again.flush()
    assert read_experts(path).counts[:, 0].tolist() == [[1, 0, 0, 1]]


def batch_of(tokens: list[int], computed: int) -> Batch:
    request = Request("r", tokens, 3, SamplingParams(), 0, num_computed=computed)
    scheduled = (ScheduledRequest(request, len(tokens) - computed),)
    return Batch(prefill=scheduled) if computed == 0 else Batch(decode=scheduled)


@pytest.mark.parametrize("tokens", [False, True], ids=["per_pass", "per_token"])
def test_single_passes_are_kept_and_dumped_as_sglang_does(tmp_path: Path, tokens: bool) -> None:
    passes = PassLog(0, 1, SLOTS, 0, 2, tokens, tmp_path / records.EXPERTS)
    made = recorder(tmp_path, window=1, passes=passes)
    one_pass(made, FIRST)  # forgotten: two are kept
    prefill, decode = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.tensor([[3, 0]])
    slots = [one_pass(made, prefill, batch_of([7, 8, 9], 0)), one_pass(made, decode, batch_of([7, 8, 9, 4], 3))]
    path = tmp_path / made.dump()
    content = torch.load(path, weights_only=True)
    assert path.name.endswith("_0.pt") and content["last_physical_to_logical_map"].shape == (1, SLOTS)
    one, two = content["records"]
    assert (one["forward_pass_id"], two["forward_pass_id"], one["rank"]) == (1, 2, 0)
    assert one["global_physical_count"][0].tolist() == torch.bincount(slots[0].flatten(), minlength=SLOTS).tolist()
    assert formats.read_counts(path).load_LE[0].tolist() == [2, 2, 2, 2]
    if tokens:
        assert (one["forward_mode"], two["forward_mode"]) == ("EXTEND", "DECODE")
        assert one["input_ids"].tolist() == [7, 8, 9] and two["positions"].tolist() == [3]
        assert one["topk_ids_of_layer"].tolist() == slots[0][None].tolist() and one["extend_seq_lens"] == [3]
    else:
        assert "topk_ids_of_layer" not in one


def test_a_file_without_pairs_and_slots_is_read(tmp_path: Path) -> None:
    found = ExpertCounts(
        np.zeros((1, 1, 4), np.int64), np.zeros((1, 2)), np.zeros((1, 1, 4), np.int32), np.zeros(1),
        np.array([5], np.int32), 2,
    )  # fmt: skip
    write_experts(tmp_path / "old.npz", found)
    again = read_experts(tmp_path / "old.npz")
    assert again.pairs is None and again.slot_counts is None


def test_modes_are_config_values() -> None:
    assert EngineConfig().expert_distribution_recorder_mode == "stat"
