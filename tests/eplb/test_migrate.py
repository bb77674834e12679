"""Migration schedules: carried out on plain arrays they give the new placement, and they agree between ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from toolkit.engine.eplb.migrate import Traffic, chunks, layer_moves, traffic

Ints = NDArray[np.int64]


def carry_out(old_R: Ints, new_R: Ints, ranks: int, nodes: int) -> Ints:
    """What the slots hold afterwards when every rank follows its list; an expert's weights are its number."""
    moves = layer_moves(old_R, new_R, ranks, nodes)
    before = old_R.reshape(ranks, -1)
    after = before.copy()
    wire = [send for rank in moves for send in rank.sends]
    assert sorted(wire) == sorted(recv for rank in moves for recv in rank.recvs)
    for rank, does in enumerate(moves):
        assert does.sends == sorted(does.sends, key=lambda t: t.expert), "posted in one order on all ranks"
        for send in does.sends:
            assert send.source == rank != send.target and before[rank, send.source_slot] == send.expert
            assert send.same_node == (rank // (ranks // nodes) == send.target // (ranks // nodes))
        for source, target in does.copies:
            after[rank, target] = before[rank, source]
        for recv in does.recvs:
            after[rank, recv.target_slot] = recv.expert
        for source, target in does.copies_after:
            after[rank, target] = after[rank, source]
    return after.ravel()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]), st.integers(1, 4))
def test_following_the_lists_gives_the_new_placement(data: st.DataObject, size: tuple[int, int], slots: int) -> None:
    ranks, nodes = size
    experts = data.draw(st.integers(1, ranks * slots))
    rest = st.lists(st.integers(0, experts - 1), min_size=ranks * slots - experts, max_size=ranks * slots - experts)
    old, new = (np.array(data.draw(st.permutations([*range(experts), *data.draw(rest)])), np.int64) for _ in range(2))
    assert (carry_out(old, new, ranks, nodes) == new).all()


def test_own_copies_first_then_the_own_node_then_others_dealt_evenly() -> None:
    # 4 ranks of 2 slots on 2 nodes; expert 0 is on ranks 0 and 2
    old, new = np.array([0, 1, 2, 3, 0, 4, 5, 6]), np.array([1, 0, 0, 3, 0, 4, 0, 6])
    moves = layer_moves(old, np.where(new == 5, 6, new), 4, 2)
    assert moves[0].copies == [(1, 0), (0, 1)] and not moves[0].recvs
    assert [(t.source, t.same_node) for t in moves[1].recvs] == [(0, True)]
    assert [(t.source, t.same_node) for t in moves[3].recvs] == [(2, True)]
    far = layer_moves(np.array([0, 1, 2, 3]), np.array([0, 1, 0, 0]), 4, 2)
    assert [t.same_node for t in far[0].sends] == [False, False]
    two = layer_moves(np.array([0, 0, 2, 3]), np.array([0, 0, 0, 0]), 4, 2)
    assert [len(rank.sends) for rank in two] == [1, 1, 0, 0], "dealt over those who hold it"


def test_an_expert_wanted_twice_on_a_rank_is_received_once() -> None:
    moves = layer_moves(np.array([0, 0, 1, 2]), np.array([1, 1, 1, 2]), 2)
    assert len(moves[0].recvs) == 1 and moves[0].copies_after == [(0, 1)]


def test_traffic_and_chunks() -> None:
    old = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]])
    new = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [2, 1, 0, 3]])
    assert traffic(old, new, 2) == Traffic(copies=2, same_node=2, cross_node=0)
    assert traffic(old, new, 2, 2) == Traffic(copies=2, same_node=0, cross_node=2)
    assert chunks(old, new, None) == [[1, 2]] and chunks(old, new, 1) == [[1], [2]]
    assert chunks(old, old, 1) == []
