"""The weighted choice of replicas on a GPU: the host's split, and the same in a CUDA graph as outside of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.eplb.test_replica_kernels import both_ways
from toolkit.engine.eplb.replicas import WeightedOnDevice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPES = [
    (128, 144, 2, 1024), (128, 156, 12, 256), (256, 288, 32, 2048), (384, 512, 64, 4096), (128, 512, 64, 1024),
    (32, 60, 12, 8192), (256, 288, 32, 131072),
]  # fmt: skip


@pytest.mark.parametrize(("experts", "slots", "gpus", "assignments"), SHAPES)
def test_the_weighted_choice_is_the_hosts(experts: int, slots: int, gpus: int, assignments: int) -> None:
    both_ways(experts, slots, gpus, assignments, "cuda:0")


def test_a_graph_holds_it_and_follows_a_new_placement() -> None:
    choice, rng = WeightedOnDevice(1, 64, 80, 1, 4, 1, "cuda:0"), np.random.default_rng(0)
    rows = [rng.permutation(np.concatenate([np.arange(64), rng.integers(0, 64, 16)])) for _ in range(2)]
    ids = torch.from_numpy(rng.integers(-1, 64, (96, 8))).to("cuda:0")
    choice.update(0, choice.prepare(rows[0]))
    choice(0, ids)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = choice(0, ids)
    for row in (rows[0], rows[1], rows[0]):
        choice.update(0, choice.prepare(row))
        ids.copy_(torch.from_numpy(rng.integers(-1, 64, (96, 8))))
        graph.replay()
        again = held.clone()
        graph.replay()
        assert torch.equal(held, again) and torch.equal(held, choice(0, ids)), "the same batch goes the same ways"
        real = ids.cpu() >= 0
        assert torch.equal(torch.from_numpy(row)[held.cpu()[real]], ids.cpu()[real]) and (held.cpu()[~real] == -1).all()
