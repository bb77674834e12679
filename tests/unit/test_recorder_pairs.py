"""The recorder's pairs: tokens that chose two experts together, against a count by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from toolkit import records
from toolkit.engine.eplb.placement import Placement
from toolkit.engine.eplb.recorder import Recorder


def test_pairs_of_the_first_pass_of_each_window_are_counted_and_padding_is_not(tmp_path: Path) -> None:
    placement = Placement.trivial(1, num_experts=4, slots=4, ep_rank=0, ep_size=2, device="cpu")
    recorder = Recorder((5,), placement, 2, lambda tensor: tensor.mul_(3), tmp_path / records.EXPERTS, "cpu")
    first, ignored = torch.tensor([[0, 1], [1, 0], [2, 3], [-1, -1], [3, -1]]), torch.tensor([[0, 3]])
    for ids in (first, ignored, first):
        recorder.record(0, ids)
        recorder.end_of_pass()
    recorder.end_of_pass(flush=True)
    pairs = records.read_experts(tmp_path / records.EXPERTS).pairs
    assert pairs is not None
    expected = [[0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]]
    assert (pairs[0] == 3 * torch.tensor(expected).numpy()).all()  # the sum over ranks stood in for by a factor


def test_a_file_without_pairs_is_read(tmp_path: Path) -> None:
    placement = Placement.trivial(1, num_experts=4, slots=4, ep_rank=0, ep_size=2, device="cpu")
    recorder = Recorder((5,), placement, 2, lambda tensor: tensor, tmp_path / records.EXPERTS, "cpu")
    recorder.write()
    assert records.read_experts(tmp_path / records.EXPERTS).pairs is None
