"""Kernels of EPLB in Triton's interpreter: the weighted choice against the split on the host, the recorder's counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.interpreted import interpret, needs_triton
from toolkit.engine.eplb.planner import plan
from toolkit.engine.eplb.replicas import WeightedOnDevice, WeightedOnHost

SHAPES = [
    (16, 24, 4, 300),
    (16, 16, 4, 40),
    (64, 96, 8, 1400),
    (32, 60, 12, 4200),
]  # the last one counted beforehand, with an expert of many replicas


def counted(experts: int, slots: int, gpus: int, assignments: int) -> None:
    """Two passes of ids with padding, and rows received, onto what is there already."""
    from toolkit.engine.kernels.counting import count

    rng, local = np.random.default_rng(experts), slots // gpus
    counts, received = torch.full((experts,), 2**40), torch.full((local,), 7)
    wanted, wanted_rows = counts.clone(), received.clone()
    for size in (assignments, 4):
        ids = torch.from_numpy(rng.integers(-1, experts, (size // 4, 4)))
        rows = torch.from_numpy(rng.integers(0, 1000, local)).int()
        count(ids, counts, rows, received)
        wanted += torch.bincount(ids[ids >= 0], minlength=experts)
        wanted_rows += rows
    count(ids[:0], counts, rows, received)
    assert torch.equal(counts, wanted) and torch.equal(received, wanted_rows + rows)


def both_ways(experts: int, slots: int, gpus: int, assignments: int, where: str = "cpu") -> None:
    """The same batches on the host and by the kernels: every id to a slot of its expert, GPUs equally level."""
    rng = np.random.default_rng(experts + slots)
    load = np.stack([rng.permutation(np.arange(1, experts + 1) ** -0.8) for _ in range(2)])
    placed = plan(load, slots, num_gpus=gpus).phy2log_LR
    for rank in (0, gpus - 1):
        shape = (2, experts, slots, rank, gpus, 1)
        device, host = WeightedOnDevice(*shape, where), WeightedOnHost(*shape, "cpu")
        addresses = device.table_L.data_ptr()
        for layer in (0, 1):
            for choice in (device, host):
                choice.update(layer, choice.prepare(placed[1 - layer]))
                choice.update(layer, choice.prepare(placed[layer]))
            chance = load[layer] / load[layer].sum()
            ids = torch.from_numpy(rng.choice(experts, size=(assignments // 4, 4), p=chance))
            ids[-3:] = -1
            found, wanted = device(layer, ids.to(where)).cpu(), host(layer, ids)
            assert (found[-3:] == -1).all() and found.shape == ids.shape
            assert torch.equal(torch.from_numpy(placed[layer])[found[:-3]], ids[:-3])
            loads = [np.bincount(slots_[:-3].numpy().ravel() // (slots // gpus), minlength=gpus)
                     for slots_ in (found, wanted)]  # fmt: skip
            most = loads[1].max() + 2 + 0.01 * loads[1].mean()  # float32 and float64 may round a token differently
            assert loads[0].max() <= most, f"{loads[0]} is less level than {loads[1]}"
            assert (found == wanted).float().mean() > 0.98
        assert device(0, ids[:0].to(where)).shape == (0, 4) and device.table_L.data_ptr() == addresses


@needs_triton
@pytest.mark.parametrize("what", ["both_ways", "counted"])
def test_kernels_do_what_the_host_does(what: str) -> None:
    interpret(__name__, what)
