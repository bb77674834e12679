"""Which replica a token goes to: nearest, in turn, or what levels the batch; and that maps change in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.engine.eplb.placement import Placement, start_placement
from toolkit.engine.eplb.replicas import ALGORITHMS, nearest


def placed(seed: int, experts: int = 16, slots: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]))


def dealt_one_by_one(row: np.ndarray, ranks: int, nodes: int) -> np.ndarray:
    """What ``nearest`` says in words, [ranks, E]: owners first, then those of their nodes, then others."""
    local, node = len(row) // ranks, ranks // nodes
    table = np.zeros((ranks, row.max() + 1), np.int64)
    for expert in range(table.shape[1]):
        slots = np.flatnonzero(row == expert)
        slots = np.roll(slots, expert) if len(slots) > 1 else slots
        used, left = dict.fromkeys(slots.tolist(), 0), set(range(ranks))
        for near in (lambda s, r: s // local == r, lambda s, r: s // local // node == r // node, lambda s, r: True):
            for rank in sorted(left):
                if allowed := [slot for slot in used if near(slot, rank)]:
                    table[rank, expert] = choice = min(allowed, key=lambda slot: used[slot])
                    used[choice] += 1
                    left.discard(rank)
    return table


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 1), (4, 2), (8, 2), (8, 4)]))
def test_static_takes_the_own_gpu_then_the_node_then_any_and_shares_evenly(seed: int, shape: tuple[int, int]) -> None:
    ranks, nodes = shape
    row = placed(seed)
    table = np.stack([nearest(row, 16, ranks, nodes, rank) for rank in range(ranks)])
    local, node = 24 // ranks, ranks // nodes
    assert (table == dealt_one_by_one(row, ranks, nodes)).all()
    for expert in range(16):
        slots = np.flatnonzero(row == expert)
        for rank in range(ranks):
            choice = table[rank, expert]
            assert choice in slots
            if any(slots // local == rank):
                assert choice // local == rank
            elif any(slots // local // node == rank // node):
                assert choice // local // node == rank // node
        if nodes == 1:  # whoever has no own replica makes up for those who have
            used = np.array([(table[:, expert] == slot).sum() for slot in slots])
            own = max(int((slots // local == rank).sum()) for rank in range(ranks))
            assert used.max() - used.min() <= 1 or own > 1 or used.max() <= 1


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_every_way_finds_a_slot_of_the_expert_and_leaves_padding(algorithm: str) -> None:
    rows = np.stack([placed(1), placed(2)])
    made = Placement(rows, 16, 1, 4, "cpu", 2, algorithm)
    ids = torch.randint(0, 16, (40, 3))
    ids[30:] = -1
    for layer in range(2):
        slots = made.to_slots(layer, ids)
        assert (slots[30:] == -1).all()
        assert torch.equal(torch.from_numpy(rows[layer])[slots[:30]], ids[:30])


@pytest.mark.parametrize("algorithm", ["static", "dynamic"])
def test_maps_change_in_place(algorithm: str) -> None:
    made = Placement(np.stack([placed(1), placed(2)]), 16, 1, 4, "cpu", 1, algorithm)
    tensors = [t for t in vars(made._choice).values() if isinstance(t, torch.Tensor)]
    addresses = [t.data_ptr() for t in tensors]
    made.update(0, made.prepare(placed(3)))
    ids = torch.arange(16)[:, None]
    assert torch.equal(torch.from_numpy(placed(3))[made.to_slots(0, ids)], ids)
    assert torch.equal(torch.from_numpy(placed(2))[made.to_slots(1, ids)], ids)
    assert [t.data_ptr() for t in vars(made._choice).values() if isinstance(t, torch.Tensor)] == addresses
    assert made.local_experts(0) == placed(3)[6:12].tolist()


def loads(algorithm: str, ids: torch.Tensor, row: np.ndarray, ranks: int) -> np.ndarray:
    """Assignments of each GPU when every rank sends the same batch."""
    total = np.zeros(ranks)
    for rank in range(ranks):
        slots = Placement(row[None], 16, rank, ranks, "cpu", 1, algorithm).to_slots(0, ids)
        total += np.bincount(slots.flatten().numpy() // (len(row) // ranks), minlength=ranks)
    return total


def test_weighted_levels_what_an_even_split_cannot() -> None:
    """Expert 0 is hot and beside another hot one on GPU 0: its replica on GPU 3 has to take more."""
    row = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 2, 4, 6])
    ids = torch.tensor([[0, 1]] * 30 + [[2 + i % 14, 9] for i in range(30)])
    even, level = (loads(name, ids, row, 4) for name in ("dynamic", "weighted"))
    assert even.sum() == level.sum() == 4 * ids.numel()
    assert level.max() < even.max()


def test_an_initial_placement_reaches_all_ranks_and_so_does_what_is_wrong_with_it() -> None:
    given = '{"physical_to_logical_map": [[3, 2, 1, 0], [0, 1, 2, 3]]}'
    sent: list[bytes] = []

    def first(message: bytes) -> bytes:
        sent.append(message)
        return message

    ask = ((0, 1), 4, 4, 2, 1, 1)
    mine = start_placement(given, first, True, *ask)
    theirs = start_placement(given, lambda _: sent[0], False, *ask)
    assert mine.tolist() == theirs.tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]
    sent.clear()
    for leads, tell in ((True, first), (False, lambda _: sent[0])):
        with pytest.raises(ValueError, match=r"engine.init_expert_location.*use ep_num_redundant_experts=0"):
            start_placement(given, tell, leads, (0, 1), 4, 6, 2, 1, 1)
