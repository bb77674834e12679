"""Weighted dispatch: how a batch's tokens of an expert are split over its replicas.

Splitting evenly is what placements are planned for, but a single batch differs from the window they were planned from.
Given the batch's counts, the split here levels the GPUs: in turn, each replicated expert pours its tokens into the
GPUs that hold it, like water over their load from all other experts, until nothing changes. That minimises the sum of
squared GPU loads, whose minimum also has the least possible largest load (the optimum of the linear programme).
One layer; pure numpy, compiled where numba is there. Knows nothing of the dispatchers that use the split.
E: experts, X: most replicas of an expert, G: GPUs, S: slots a GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SWEEPS = 10
CLOSE = 2e-3
"""It ends when a sweep moves less than this part of the mean GPU load."""


@jit
def split(counts_E: Ints, log2phy_EX: Ints, gpus: int, slots: int) -> Ints:
    """Tokens that each replica of each expert gets, [E, X]; rows sum to ``counts_E``, padding (-1) gets 0.

    Args:
        counts_E: assignments of the batch, of all ranks or of one.
        log2phy_EX: the layer's slots of each expert, padded with -1; slot // ``slots`` is the GPU.
    """
    experts, width = log2phy_EX.shape
    share_EX, load_G = np.zeros((experts, width)), np.zeros(gpus)
    several, count_E, gpu_EX = np.empty(experts, np.int64), np.zeros(experts, np.int64), log2phy_EX // slots
    base_X, order_X = np.empty(width), np.empty(width, np.int64)
    many = 0
    for expert in range(experts):
        count = 0
        while count < width and log2phy_EX[expert, count] >= 0:
            count += 1
        count_E[expert] = count
        for x in range(count):
            share_EX[expert, x] = counts_E[expert] / count
            load_G[gpu_EX[expert, x]] += share_EX[expert, x]
        if count > 1 and counts_E[expert] > 0:
            several[many] = expert
            many += 1
    several = several[:many][np.argsort(-counts_E[several[:many]])]  # the hottest first: it settles sooner
    enough = CLOSE * load_G.sum() / gpus
    for _ in range(SWEEPS):
        shifted = 0.0
        for index in range(many):
            expert = several[index]
            moved = _pour(share_EX[expert], gpu_EX[expert], count_E[expert], load_G, base_X, order_X)
            shifted = max(shifted, moved)
        if shifted <= enough:
            break
    return _whole(share_EX, counts_E, count_E)


@jit
def _pour(share_X: Floats, gpu_X: Ints, count: int, load_G: Floats, base_X: Floats, order_X: Ints) -> float:
    """Levels one expert's GPUs with its tokens; the largest change of a share. The last two are work space."""
    total = 0.0
    for x in range(count):
        total += share_X[x]
        base_X[x] = load_G[gpu_X[x]] - share_X[x]
        at = x
        while at > 0 and base_X[order_X[at - 1]] > base_X[x]:
            order_X[at] = order_X[at - 1]
            at -= 1
        order_X[at] = x
    level, below = 0.0, 0.0
    for used in range(1, count + 1):
        below += base_X[order_X[used - 1]]
        level = (total + below) / used
        if used == count or level <= base_X[order_X[used]]:
            break
    shifted = 0.0
    for x in range(count):
        share = max(0.0, level - base_X[x])
        shifted = max(shifted, abs(share - share_X[x]))
        load_G[gpu_X[x]] += share - share_X[x]
        share_X[x] = share
    return shifted


@jit
def _whole(share_EX: Floats, counts_E: Ints, count_E: Ints) -> Ints:
    """Whole tokens: rounded down, what is left over goes where the cut was largest."""
    tokens_EX = np.zeros(share_EX.shape, np.int64)
    for expert in range(len(counts_E)):
        count, left = count_E[expert], counts_E[expert]
        if count == 1:
            tokens_EX[expert, 0] = left
            continue
        for x in range(count):
            tokens_EX[expert, x] = int(share_EX[expert, x] + 1e-9)
            left -= tokens_EX[expert, x]
        for _ in range(left):
            most = 0
            for x in range(1, count):
                cut = share_EX[expert, x] - tokens_EX[expert, x]
                if cut > share_EX[expert, most] - tokens_EX[expert, most]:
                    most = x
            tokens_EX[expert, most] += 1
    return tokens_EX


def split_loads(tokens_EX: Ints, log2phy_EX: Ints, gpus: int, slots: int) -> Ints:
    """Load of each GPU under a split, [G]."""
    real = log2phy_EX >= 0
    return np.bincount(log2phy_EX[real] // slots, weights=tokens_EX[real], minlength=gpus).astype(np.int64)


def choose(ids_A: Ints, tokens_EX: Ints, log2phy_EX: Ints) -> Ints:
    """Slot of each assignment of the batch, in order, [A]; -1 stays -1.

    The first ``tokens_EX[e, 0]`` assignments to expert e go to its first replica, the next to its second, and so on.
    """
    out_A = np.full(len(ids_A), -1, np.int64)
    real = ids_A >= 0
    order = np.argsort(ids_A, kind="stable")[int((~real).sum()) :]
    slots_A = np.repeat(log2phy_EX.ravel(), tokens_EX.ravel())
    assert len(slots_A) == len(order), "the split is of another batch"
    out_A[order] = slots_A
    return out_A
