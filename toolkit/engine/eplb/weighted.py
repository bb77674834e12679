"""Weighted dispatch: how a batch's tokens of an expert are split over its replicas.

Splitting evenly is what placements are planned for, but a single batch differs from the window they were planned from.
The split here levels the GPUs with the batch's own counts: it minimises the sum of squared GPU loads, whose minimum
also has the least possible largest load (the optimum of the linear programme). If no share could be negative, that
would be one product with a matrix that the placement alone decides; so that is worked out with the placement, and
rounds alternate between it and the cut at zero (Douglas-Rachford splitting: Eckstein and Bertsekas 1992). In each a
change reaches all GPUs, not only those beside it, so that 12 do what took 24 of projected gradients with momentum.
GPUs run the same rounds: ``toolkit/engine/kernels/replicas.py``.
One layer; pure numpy, compiled where numba is there. Knows nothing of the dispatchers that use the split.
E: experts, R: slots, P: places, F: windows, G: GPUs, A: assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WIDTH, APART = 8, 6
"""Places of a window, and how far the windows of one expert are apart at most."""

STIFF = 0.5
"""What keeps a round's shares near the last ones, beside 1 for GPU loads. Less: far moves, much of them cut at zero."""

STRIDE = 1.6
"""Of a round's move, how much is made: above 1 is over-relaxed, 2 would not converge."""

UP = 0.55
"""Rounds parts of tokens. More than 0.5: of an odd number on two replicas the first gets more, whatever floats say, and
which GPU has the first differs from expert to expert; else a hair's breadth would send them all to the same GPU."""

CLOSE = 1e-4
"""The host ends when a round moves no share by more than this part of the mean GPU load."""

FEW_GPUS, ROUNDS = 8, {"few GPUs": 6, "many": 12, "several windows": 24}
"""After which the split is within 0.01 of the optimum on all loads of the benchmark. Few GPUs are levelled soon; it
takes longer where tokens have to move from window to window."""


@dataclass(frozen=True)
class Table:
    """A layer's placement as the split reads it; made when the placement changes.

    A window is up to ``WIDTH`` replicas of an expert that share tokens. Most experts have one. Those with more replicas
    have several windows of a fixed part of the tokens each, which overlap, so that tokens can still move from any
    replica to any other. A replica has a place in each of its windows.

    Attributes:
        slot_P, gpu_P: slots and their GPUs, expert by expert, window by window.
        first_E: each expert's first place; count_E: its places.
        expert_F: of experts with several replicas, window by window; first_F: its first place; size_F: its places.
        part_F: of the expert's tokens, shared in the window; even_P: at the place when all replicas get equally many.
        smooth_GG: GPU loads of given shares -> those of the nearest shares that have given sums and are as level as
            ``STIFF`` lets them; symmetric.
        rounds: of the levelling, at most.
    """

    slot_P: Ints
    gpu_P: Ints
    first_E: Ints
    count_E: Ints
    expert_F: Ints
    first_F: Ints
    size_F: Ints
    part_F: Floats
    even_P: Floats
    smooth_GG: Floats
    rounds: int


def make_table(phy2log_R: Ints, experts: int, gpus: int, turn: int = 0) -> Table:
    """The table of a layer's placement.

    Args:
        turn: which of its replicas, in a circle, an expert begins with; each expert with another, so that neither the
            experts of a batch nor the ranks, each with its own turn, all round to the same GPU.
    """
    replicas_E = np.bincount(phy2log_R, minlength=experts)
    windows_E = np.where(replicas_E > WIDTH, -(-replicas_E // APART), 1)
    count_E = np.where(replicas_E > WIDTH, WIDTH * windows_E, replicas_E)
    first_E, expert_P = count_E.cumsum() - count_E, np.arange(experts).repeat(count_E)
    window, within = np.divmod(np.arange(len(expert_P)) - first_E[expert_P], WIDTH)
    which = (window * replicas_E[expert_P] // windows_E[expert_P] + within) % replicas_E[expert_P]
    begin_P = (replicas_E.cumsum() - replicas_E)[expert_P]  # of the expert's slots among all, sorted by expert
    slot_P = np.argsort(phy2log_R, kind="stable")[begin_P + (which + turn + expert_P) % replicas_E[expert_P]]
    times_R = np.bincount(begin_P + which, minlength=len(phy2log_R))
    even_P = 1.0 / (replicas_E[expert_P] * times_R[begin_P + which])
    gpu_P, several_P = slot_P // (len(phy2log_R) // gpus), replicas_E[expert_P] > 1
    first_F = np.flatnonzero(several_P & (within == 0))
    window_P = np.cumsum(within[several_P] == 0) - 1
    size_F = np.bincount(window_P, minlength=len(first_F))
    part_F = np.bincount(window_P, weights=even_P[several_P], minlength=len(first_F)).astype(np.float64)
    several = "several windows" if len(first_F) > (replicas_E > 1).sum() else "many"
    return Table(
        slot_P, gpu_P, first_E, count_E, expert_P[first_F], first_F, size_F, part_F, even_P,
        _smooth(window_P, gpu_P[several_P], size_F, gpus),
        ROUNDS["few GPUs" if gpus <= FEW_GPUS and several == "many" else several],
    )  # fmt: skip


def _smooth(window_W: Ints, gpu_W: Ints, size_F: Ints, gpus: int) -> Floats:
    """``Table.smooth_GG``; W: the places of windows.

    Minimising |load|^2 + STIFF |shares - given|^2 over shares whose windows' sums are given makes each share its given
    one plus (mean load of its window's GPUs - load of its own) / STIFF. Summed by GPU, these are equations for loads.
    """
    on_FG = np.zeros((len(size_F), gpus))
    np.add.at(on_FG, (window_W, gpu_W), 1.0)
    flow_GG = np.diag(on_FG.sum(0)) - on_FG.T @ (on_FG / size_F[:, None])
    return np.asarray(STIFF * np.linalg.inv(STIFF * np.eye(gpus) + flow_GG), np.float64)


def split(counts_E: Ints, table: Table) -> Ints:
    """Tokens that each place gets, [P]; each expert's sum to its count.

    Args:
        counts_E: assignments of the batch, of all ranks or of one.
    """
    t = table
    return _split(
        counts_E, t.gpu_P, t.first_E, t.count_E, t.expert_F, t.first_F, t.size_F, t.part_F, t.even_P, t.smooth_GG,
        t.rounds,
    )  # fmt: skip


@jit
def _split(
    counts_E: Ints, gpu_P: Ints, first_E: Ints, count_E: Ints, expert_F: Ints, first_F: Ints, size_F: Ints,
    part_F: Floats, even_P: Floats, smooth_GG: Floats, turns: int,
) -> Ints:  # fmt: skip
    tokens_P, base_G = np.zeros(len(gpu_P), np.int64), np.zeros(len(smooth_GG))
    for expert in range(len(counts_E)):
        if count_E[expert] == 1:
            tokens_P[first_E[expert]] = counts_E[expert]
            base_G[gpu_P[first_E[expert]]] += counts_E[expert]
    share_P = even_P * 0.0
    for f in range(len(first_F)):
        for p in range(first_F[f], first_F[f] + size_F[f]):
            share_P[p] = even_P[p] * counts_E[expert_F[f]]
    total_F = part_F * counts_E[expert_F]
    _level(share_P, total_F, base_G, gpu_P, first_F, size_F, smooth_GG, turns, CLOSE * counts_E.sum() / len(base_G))
    given, upto = 0, 0.0
    for f in range(len(first_F)):
        first, end = first_F[f], first_F[f] + size_F[f]
        if first == first_E[expert_F[f]]:
            given, upto = 0, 0.0
        for p in range(first, end):
            upto += share_P[p]
            tokens_P[p] = max(0, int(np.floor(upto + UP)) - given)
            given += tokens_P[p]
        if end == first_E[expert_F[f]] + count_E[expert_F[f]]:
            tokens_P[end - 1] += counts_E[expert_F[f]] - given
    return tokens_P


@jit
def _level(
    share_P: Floats, total_F: Floats, base_G: Floats, gpu_P: Ints, first_F: Ints, size_F: Ints, smooth_GG: Floats,
    turns: int, enough: float,
) -> None:  # fmt: skip
    """Levels the shares of all windows, beside what GPUs have of other experts; in place.

    Between rounds ``share_P`` may be negative: its positive part is the split, its negative part how much each place
    has been cut, so that its magnitude is what the next round starts from.
    """
    given_P, sum_G, load_G = np.zeros(len(share_P)), np.empty(len(base_G)), np.empty(len(base_G))
    for _ in range(turns):
        sum_G[:] = base_G
        for f in range(len(first_F)):
            first, end, missing = first_F[f], first_F[f] + size_F[f], total_F[f]
            for p in range(first, end):
                missing -= abs(share_P[p])
            for p in range(first, end):
                given_P[p] = abs(share_P[p]) + missing / size_F[f]
                sum_G[gpu_P[p]] += given_P[p]
        load_G[:] = 0.0
        for gpu in range(len(base_G)):  # a row times a number, which becomes vector instructions
            for other in range(len(base_G)):
                load_G[other] += smooth_GG[gpu, other] * sum_G[gpu]
        moved = 0.0
        for f in range(len(first_F)):
            first, end, mean = first_F[f], first_F[f] + size_F[f], 0.0
            for p in range(first, end):
                mean += load_G[gpu_P[p]] / size_F[f]
            for p in range(first, end):
                level = given_P[p] + (mean - load_G[gpu_P[p]]) / STIFF
                move = level - max(share_P[p], 0.0)
                share_P[p] += STRIDE * move
                moved = max(moved, abs(move))
        if moved <= enough:
            break
    for f in range(len(first_F)):
        first, end, kept = first_F[f], first_F[f] + size_F[f], 0.0
        for p in range(first, end):
            share_P[p] = max(share_P[p], 0.0)
            kept += share_P[p]
        for p in range(first, end):
            share_P[p] *= total_F[f] / max(kept, 1e-6)


def split_loads(tokens_P: Ints, table: Table) -> Ints:
    """Load of each GPU under a split, [G]."""
    return np.bincount(table.gpu_P, weights=tokens_P, minlength=len(table.smooth_GG)).astype(np.int64)


def choose(ids_A: Ints, tokens_P: Ints, table: Table) -> Ints:
    """Slot of each assignment of the batch, in order, [A]; -1 stays -1.

    The first assignments to an expert go to its first place, as many as it gets, the next to its second, and so on.
    """
    out_A = np.full(len(ids_A), -1, np.int64)
    real = ids_A >= 0
    order = np.argsort(ids_A, kind="stable")[int((~real).sum()) :]
    slots_A = np.repeat(table.slot_P, tokens_P)
    assert len(slots_A) == len(order), "the split is of another batch"
    out_A[order] = slots_A
    return out_A
