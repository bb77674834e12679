"""What has to travel when a placement changes: every rank's transfers, worked out alike from the two maps alone.

Owns the pure part, one layer at a time; ``schedule.py`` cuts whole placements into chunks of it and ``mover.py``
carries them out. Slot r is on rank r // (R / ranks), rank g on node g // (ranks / nodes).
Source of the order of preference: SGLang's expert location updater (own slot, own rank, same node, other node).
R: slots of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Transfer:
    """One expert's weights from one rank to another. Their natural order is one that all ranks agree on.

    Attributes:
        expert: whose weights; also the tag that tells transfers between two ranks apart.
        source, target: ranks.
        source_slot, target_slot: local to their rank.
        same_node: both ranks are on one node.
    """

    expert: int
    source: int
    target: int
    source_slot: int
    target_slot: int
    same_node: bool


@dataclass
class RankMoves:
    """What one rank does in a layer.

    Attributes:
        copies: (from, to) local slots; sources are the contents before the change. An expert that arrives from
            elsewhere and is wanted in several slots is received once: ``copies_after`` are made from where it arrived.
        sends, recvs: transfers, in the order in which every rank posts them.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    copies_after: list[tuple[int, int]] = field(default_factory=list)
    sends: list[Transfer] = field(default_factory=list)
    recvs: list[Transfer] = field(default_factory=list)


def layer_moves(old_R: Ints, new_R: Ints, ranks: int, nodes: int = 1) -> list[RankMoves]:
    """The moves of every rank that turn a layer's placement ``old_R`` into ``new_R``; empty where nothing changes.

    A slot whose expert stays needs nothing. One whose expert the rank held elsewhere is a local copy. The others are
    received, from a rank on the same node if one holds the expert, and those who need it are dealt evenly over those
    who have it. Every rank computes the same list.
    """
    slots = len(old_R) // ranks
    assert old_R.shape == new_R.shape and slots * ranks == len(old_R), (old_R.shape, new_R.shape, ranks)
    moves = [RankMoves() for _ in range(ranks)]
    old, new = old_R.reshape(ranks, slots).tolist(), new_R.reshape(ranks, slots).tolist()
    held: dict[int, dict[int, int]] = {}  # expert -> rank -> its first slot there
    for rank, row in enumerate(old):
        for slot, expert in enumerate(row):
            held.setdefault(expert, {}).setdefault(rank, slot)
    wanted: dict[int, list[tuple[int, int]]] = {}  # expert -> (rank, slot) that have to receive it
    for rank in range(ranks):
        arriving: dict[int, int] = {}
        for slot, expert in enumerate(new[rank]):
            if old[rank][slot] == expert:
                continue
            if rank in held.get(expert, {}):
                moves[rank].copies.append((held[expert][rank], slot))
            elif expert in arriving:
                moves[rank].copies_after.append((arriving[expert], slot))
            else:
                arriving[expert] = slot
                wanted.setdefault(expert, []).append((rank, slot))
    for expert in sorted(wanted):
        assert expert in held, f"expert {expert} is on no rank: the old placement has lost it"
        for transfer in _dealt(expert, wanted[expert], held[expert], ranks // nodes):
            moves[transfer.source].sends.append(transfer)
            moves[transfer.target].recvs.append(transfer)
    return moves


def _dealt(expert: int, wanted: list[tuple[int, int]], holders: dict[int, int], node_ranks: int) -> list[Transfer]:
    """A source for each rank that wants an expert: on its node if possible; the least used, then the lowest rank."""
    used = dict.fromkeys(sorted(holders), 0)
    transfers = []
    for target, slot in wanted:
        near = [rank for rank in used if rank // node_ranks == target // node_ranks]
        source = min(near or used, key=lambda rank: used[rank])
        used[source] += 1
        transfers.append(Transfer(expert, source, target, holders[source], slot, bool(near)))
    return transfers


@dataclass(frozen=True)
class Traffic:
    """How many experts' weights a change of placement moves, over all layers."""

    copies: int
    same_node: int
    cross_node: int


def traffic(old_LR: Ints, new_LR: Ints, ranks: int, nodes: int = 1) -> Traffic:
    """Local copies, and sends inside and between nodes, for a whole placement."""
    copies = near = far = 0
    for old_R, new_R in zip(old_LR, new_LR):
        if (old_R == new_R).all():
            continue
        for moves in layer_moves(old_R, new_R, ranks, nodes):
            copies += len(moves.copies) + len(moves.copies_after)
            near += sum(send.same_node for send in moves.sends)
            far += sum(not send.same_node for send in moves.sends)
    return Traffic(copies, near, far)


def chunks(old_LR: Ints, new_LR: Ints, layers_per_chunk: int | None) -> list[list[int]]:
    """The layers that change, ``eplb_rebalance_layers_per_chunk`` at a time (None: all at once)."""
    changed: list[int] = np.nonzero((old_LR != new_LR).any(1))[0].tolist()
    size = layers_per_chunk or max(1, len(changed))
    return [changed[first : first + size] for first in range(0, len(changed), size)]
