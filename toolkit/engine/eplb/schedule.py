"""Schedule: a change of placement as one table of moves, cut into chunks. Plain arrays, so that it can be sent.

Worked out once, where the plan is made; every rank then picks its rows. Knows no tensors. Read next: ``mover.py``.
L: layers, R: slots, M: moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.migrate import RankMoves, Transfer, layer_moves

Ints = NDArray[np.int64]

COPY, COPY_AFTER, SEND = 0, 1, 2  # as in ``migrate.RankMoves``
COLUMNS = ("layer", "kind", "expert", "source", "target", "source_slot", "target_slot", "same_node")


@dataclass(frozen=True)
class Schedule:
    """Moves in the order in which every rank carries them out.

    Attributes:
        moves_MC: columns ``COLUMNS``; ranks are EP ranks, slots local to their rank.
        ends: of each chunk, the row after its last.
    """

    moves_MC: Ints
    ends: tuple[int, ...]

    @property
    def chunks(self) -> list[Ints]:
        return [self.moves_MC[begin:end] for begin, end in zip((0, *self.ends), self.ends)]


def make_schedule(
    old_LR: Ints, new_LR: Ints, ranks: int, nodes: int, spare: int, layers_per_chunk: int | None
) -> Schedule:
    """The moves from ``old_LR`` to ``new_LR``.

    Args:
        spare: spare slots of a rank: all that a chunk writes on a rank fits into them. At least a layer's slots.
        layers_per_chunk: at most so many layers change together; None: as many as fit.
    """
    assert spare >= old_LR.shape[1] // ranks, f"{spare} spare slots are fewer than a layer's"
    rows: list[tuple[int, ...]] = []
    ends: list[int] = []
    used, layers = np.zeros(ranks, np.int64), 0
    for layer in np.flatnonzero((old_LR != new_LR).any(1)).tolist():
        moves = layer_moves(old_LR[layer], new_LR[layer], ranks, nodes)
        need = np.array([len(m.copies) + len(m.recvs) for m in moves])
        if layers and (layers == layers_per_chunk or (used + need > spare).any()):
            ends.append(len(rows))
            used, layers = np.zeros(ranks, np.int64), 0
        used, layers = used + need, layers + 1
        rows += _layer_rows(layer, new_LR[layer].reshape(ranks, -1), moves)
    if rows:
        ends.append(len(rows))
    return Schedule(np.array(rows, np.int64).reshape(-1, len(COLUMNS)), tuple(ends))


def _layer_rows(layer: int, new_GS: Ints, moves: list[RankMoves]) -> list[tuple[int, ...]]:
    """Sends first, in an order that is the same on both ends, then copies."""
    sends: list[Transfer] = sorted(send for rank in moves for send in rank.sends)
    rows: list[tuple[int, ...]] = [
        (layer, SEND, t.expert, t.source, t.target, t.source_slot, t.target_slot, int(t.same_node)) for t in sends
    ]
    for rank, rank_moves in enumerate(moves):
        for kind, copies in ((COPY, rank_moves.copies), (COPY_AFTER, rank_moves.copies_after)):
            rows += [(layer, kind, int(new_GS[rank, to]), rank, rank, of, to, 1) for of, to in copies]
    return rows
