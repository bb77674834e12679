"""Weighted dispatch: how a batch's tokens of an expert are split over its replicas.

Splitting evenly is what placements are planned for, but a single batch differs from the window they were planned from.
The split here levels the GPUs with the batch's own counts: it minimises the sum of squared GPU loads, whose minimum
also has the least possible largest load (the optimum of the linear programme). All experts move at once, each down its
gradient and back onto the splits that there are, with momentum (FISTA, Beck and Teboulle 2009), so that a GPU can do
the same with one thread a replica: ``toolkit/engine/kernels/replicas.py``.
One layer; pure numpy, compiled where numba is there. Knows nothing of the dispatchers that use the split.
E: experts, R: slots, V: experts with several replicas, W: their slots, G: GPUs, A: assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDS = 24
"""After which the split is within 0.01 of the optimum on all loads of the benchmark."""


CLOSE = 1e-3
"""The host ends when a round moves no share by more than this part of the mean GPU load."""


@dataclass(frozen=True)
class Table:
    """A layer's placement as the split reads it; made when the placement changes.

    Attributes:
        slot_R, gpu_R: slots and their GPUs, expert by expert.
        first_E: row of each expert's first slot; count_E: its replicas.
        several_V: experts with more than one replica.
        end_V: where the rows of each of these end, when theirs alone are laid one after the other: w of W.
        gpu_W: GPUs of these rows.
        step_V: step of their gradient: one by the most such rows on any of their GPUs.
        gpus: G.
    """

    slot_R: Ints
    gpu_R: Ints
    first_E: Ints
    count_E: Ints
    several_V: Ints
    end_V: Ints
    gpu_W: Ints
    step_V: Floats
    gpus: int


def make_table(phy2log_R: Ints, experts: int, gpus: int, turn: int = 0) -> Table:
    """The table of a layer's placement.

    Args:
        turn: each expert's replicas begin with this one, in a circle, so that ranks do not all round to the same.
    """
    count_E = np.bincount(phy2log_R, minlength=experts)
    first_E = count_E.cumsum() - count_E
    slot_R = np.argsort(phy2log_R, kind="stable")
    several_V = np.flatnonzero(count_E > 1)
    for expert in several_V.tolist():
        rows = slice(first_E[expert], first_E[expert] + count_E[expert])
        slot_R[rows] = np.roll(slot_R[rows], -turn)
    gpu_R = slot_R // (len(phy2log_R) // gpus)
    gpu_W = gpu_R[np.repeat(count_E > 1, count_E)]
    crowd_E = np.maximum.reduceat(np.bincount(gpu_W, minlength=gpus)[gpu_R], first_E)
    end_V = count_E[several_V].cumsum()
    return Table(slot_R, gpu_R, first_E, count_E, several_V, end_V, gpu_W, 1.0 / crowd_E[several_V], gpus)


def split(counts_E: Ints, table: Table) -> Ints:
    """Tokens that each slot gets, [R], expert by expert as in ``table.slot_R``; each expert's sum to its count.

    Args:
        counts_E: assignments of the batch, of all ranks or of one.
    """
    t = table
    return _split(counts_E, t.gpu_R, t.first_E, t.count_E, t.several_V, t.end_V, t.gpu_W, t.step_V, t.gpus)


@jit
def _split(
    counts_E: Ints, gpu_R: Ints, first_E: Ints, count_E: Ints, several_V: Ints, end_V: Ints, gpu_W: Ints,
    step_V: Floats, gpus: int,
) -> Ints:  # fmt: skip
    tokens_R, base_G = np.empty(len(gpu_R), np.int64), np.zeros(gpus)
    for expert in range(len(counts_E)):
        if count_E[expert] == 1:
            tokens_R[first_E[expert]] = counts_E[expert]
            base_G[gpu_R[first_E[expert]]] += counts_E[expert]
    tokens_W, begin = _level(counts_E[several_V], base_G, end_V, gpu_W, step_V), 0
    for v in range(len(several_V)):
        first = first_E[several_V[v]]
        tokens_R[first : first + end_V[v] - begin] = tokens_W[begin : end_V[v]]
        begin = end_V[v]
    return tokens_R


@jit
def _level(total_V: Ints, base_G: Floats, end_V: Ints, gpu_W: Ints, step_V: Floats) -> Ints:
    """Tokens of each row of the replicated experts, [W], beside what GPUs have of all others."""
    rows = len(gpu_W)
    enough = CLOSE * (base_G.sum() + total_V.sum()) / len(base_G)
    share_W, before_W, ahead_W, moved_W = np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros(rows)
    order_W, tokens_W, load_G = np.arange(rows), np.zeros(rows, np.int64), np.empty(len(base_G))
    begin = 0
    for v in range(len(end_V)):
        share_W[begin : end_V[v]] = total_V[v] / (end_V[v] - begin)
        begin = end_V[v]
    before_W[:] = share_W
    for turn in range(ROUNDS):
        momentum, shifted = turn / (turn + 3.0), 0.0
        load_G[:] = base_G
        for w in range(rows):
            ahead_W[w] = share_W[w] + momentum * (share_W[w] - before_W[w])
            load_G[gpu_W[w]] += ahead_W[w]
            before_W[w] = share_W[w]
        begin = 0
        for v in range(len(end_V)):
            end, total = end_V[v], float(total_V[v])
            for w in range(begin, end):
                moved_W[w] = ahead_W[w] - step_V[v] * load_G[gpu_W[w]]
            if end - begin == 2:  # most have two, and a call costs more than this
                share_W[begin] = min(total, max(0.0, 0.5 * (total + moved_W[begin] - moved_W[begin + 1])))
                share_W[begin + 1] = total - share_W[begin]
            else:
                _onto_simplex(moved_W, order_W, begin, end, total, share_W)
            begin = end
        for w in range(rows):
            shifted = max(shifted, abs(share_W[w] - before_W[w]))
        if shifted <= enough:
            break
    begin = 0
    for v in range(len(end_V)):
        given, upto = 0, 0.0
        for w in range(begin, end_V[v]):
            upto += share_W[w]
            whole = int(np.floor(upto + 0.5)) if w + 1 < end_V[v] else total_V[v]
            tokens_W[w], given = whole - given, whole
        begin = end_V[v]
    return tokens_W


@jit
def _onto_simplex(moved_W: Floats, order_W: Ints, first: int, end: int, total: float, share_W: Floats) -> None:
    """Writes the shares nearest to ``moved_W`` that are not negative and sum to ``total``.

    ``order_W`` keeps the rows from the largest to the smallest from turn to turn, when it hardly changes.
    """
    for index in range(first + 1, end):
        row, at = order_W[index], index
        while at > first and moved_W[order_W[at - 1]] < moved_W[row]:
            order_W[at] = order_W[at - 1]
            at -= 1
        order_W[at] = row
    above, cut = -total, 0.0
    for index in range(first, end):
        above += moved_W[order_W[index]]
        cut = above / (index - first + 1)
        if index + 1 == end or moved_W[order_W[index + 1]] <= cut:
            break
    for row in range(first, end):
        share_W[row] = max(0.0, moved_W[row] - cut)


def split_loads(tokens_R: Ints, table: Table) -> Ints:
    """Load of each GPU under a split, [G]."""
    return np.bincount(table.gpu_R, weights=tokens_R, minlength=table.gpus).astype(np.int64)


def choose(ids_A: Ints, tokens_R: Ints, table: Table) -> Ints:
    """Slot of each assignment of the batch, in order, [A]; -1 stays -1.

    The first assignments to an expert go to its first slot, as many as it gets, the next to its second, and so on.
    """
    out_A = np.full(len(ids_A), -1, np.int64)
    real = ids_A >= 0
    order = np.argsort(ids_A, kind="stable")[int((~real).sum()) :]
    slots_A = np.repeat(table.slot_R, tokens_R)
    assert len(slots_A) == len(order), "the split is of another batch"
    out_A[order] = slots_A
    return out_A
