"""One layer from loads to placement: counts, packing, and, where packing misses the bound, a search over counts.

Knows nothing of groups and policies. Read next: planner.py.
E: experts, R: replicas, G: GPUs, S: slots a GPU, L: layers, N: nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.bounds import lower_bound
from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import expand, level, next_random, pack, replica_counts, settle_ties, spare_replica

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STARTS = 8
LOOKS = 10
"""Changes of counts that are looked at for each that may be packed: a look costs a tenth."""


@jit
def solve(load_E: Floats, order_E: Ints, gpus: int, slots: int, floor: float, tolerance: float, tries: int) -> Ints:
    """Replicates and packs one layer's experts onto ``gpus`` GPUs of ``slots`` slots, [G, S].

    Aims at max(``floor``, lower bound) * (1 + ``tolerance``). Packing nearly always gets there where GPUs have many
    slots. Where it does not, the largest experts get fewer, larger replicas, in ``STARTS`` steps: the smallest
    possible ones may be too many for GPUs to hold one each, and two are too much. Then ``_search`` changes counts one
    by one, packing at most ``tries`` times. The same load gives the same placement. ``order_E`` is ``descending``.
    """
    experts, replicas = len(load_E), gpus * slots
    cap = max(gpus, -(-replicas // experts))
    count_E = replica_counts(load_E, order_E, replicas, cap)
    expert_R, load_R = np.empty(replicas, np.int64), np.empty(replicas)
    expert_GS, load_GS, load_G = np.empty((gpus, slots), np.int64), np.empty((gpus, slots)), np.empty(gpus)
    smallest = (load_E / count_E).max()
    simple = max(load_E.sum() / gpus, smallest)
    target = max(floor, simple) * (1.0 + tolerance)
    expand(load_E, count_E, order_E, expert_R, load_R)
    _arrange(expert_R, load_R, expert_GS, load_GS, load_G, target)
    best = load_G.max()
    if best <= target or replicas == experts:
        return expert_GS
    target = max(target, lower_bound(load_E, gpus, slots, simple) * (1.0 + tolerance))
    best_GS, best_E = expert_GS.copy(), count_E.copy()
    for start in range(1, STARTS + 1):
        if best <= target:
            return best_GS
        if lazy_counts(load_E, replicas, cap, smallest + (target - smallest) * start / STARTS, count_E):
            expand(load_E, count_E, order_E, expert_R, load_R)
            _arrange(expert_R, load_R, expert_GS, load_GS, load_G, target)
            if load_G.max() < best:
                best = load_G.max()
                best_GS[:], best_E[:] = expert_GS, count_E
    _search(load_E, order_E, best_E, best_GS, best, target, tries)
    return best_GS


@jit
def _search(load_E: Floats, order_E: Ints, best_E: Ints, best_GS: Ints, best: float, target: float, tries: int) -> None:
    """Moves replicas, one at a time, from experts that can spare them to larger ones, and keeps what is no worse.

    A look at the largest replicas alone (``crowding``) comes first, and only what may be better than the best so far
    is packed, up to ``tries`` times. Changes ``best_E`` and ``best_GS``, whose busiest GPU has ``best``.
    """
    gpus, slots = best_GS.shape
    replicas = gpus * slots
    cap = max(gpus, -(-replicas // len(load_E)))
    count_E, expert_R, load_R = best_E.copy(), np.empty(replicas, np.int64), np.empty(replicas)
    expert_GS, load_GS, load_G = best_GS.copy(), np.empty((gpus, slots)), np.empty(gpus)
    expand(load_E, best_E, order_E, expert_R, load_R)
    crowd, state, packed = crowding(load_R, gpus, slots, best), 1, 0
    for _ in range(LOOKS * tries):
        if best <= target or packed == tries:
            break
        count_E[:] = best_E
        state = next_random(state)
        giver = spare_replica(load_E, count_E, best, state)
        state = next_random(state)
        taker = expert_R[(state >> 8) % (replicas // 2)]
        if giver < 0:
            break
        if taker == giver or count_E[taker] >= cap:
            continue
        count_E[giver] -= 1
        count_E[taker] += 1
        expand(load_E, count_E, order_E, expert_R, load_R)
        now = crowding(load_R, gpus, slots, best)
        if now > max(crowd, target):
            continue
        if now >= best:  # a step on the way: as crowded as before, and no packing can be better
            crowd, best_E[:] = now, count_E
            continue
        packed += 1
        _arrange(expert_R, load_R, expert_GS, load_GS, load_G, target)
        if load_G.max() <= best:
            best, crowd = load_G.max(), now
            best_GS[:], best_E[:] = expert_GS, count_E


@jit
def _arrange(expert_R: Ints, load_R: Floats, expert_GS: Ints, load_GS: Floats, load_G: Floats, target: float) -> None:
    """Packs the replicas, and swaps until no GPU is above ``target`` or nothing helps."""
    pack(expert_R, load_R, expert_GS.shape[1], expert_GS, load_GS, load_G)
    level(expert_GS, load_GS, load_G, target, 8 * len(load_G))


@jit
def lazy_counts(load_E: Floats, replicas: int, cap: int, limit: float, count_E: Ints) -> bool:
    """Just enough replicas that none is above ``limit``; what is left splits experts below half of it.

    False when there are not enough. Fills ``count_E``.
    """
    left = replicas
    for expert in range(len(load_E)):
        count_E[expert] = min(cap, max(1, int(np.ceil(load_E[expert] / limit * (1.0 - 1e-12)))))
        left -= count_E[expert]
    if left < 0:
        return False
    for _ in range(left):
        taker, most = -1, -1.0
        for expert in range(len(load_E)):
            share = load_E[expert] / count_E[expert]
            if share > most and count_E[expert] < cap and load_E[expert] <= 0.5 * limit:
                taker, most = expert, share
        if taker < 0:
            return False
        count_E[taker] += 1
    return True


@jit
def crowding(load_R: Floats, gpus: int, slots: int, limit: float) -> float:
    """The least that the GPUs of the largest replicas can come to, for given counts; loads in descending order.

    The j largest replicas, each above half of ``limit``, are on j GPUs, whose other slots hold the smallest ones.
    """
    total, fill, at, worst = 0.0, 0.0, len(load_R), 0.0
    for j in range(min(gpus, len(load_R) // slots)):
        if load_R[j] <= 0.5 * limit:
            break
        total += load_R[j]
        for _ in range(slots - 1):
            at -= 1
            fill += load_R[at]
        worst = max(worst, (total + fill) / (j + 1))
    return worst


def solve_nodes(
    load_LE: Floats, members_LNE: Ints, gpus: int, slots: int, floor_L: Floats, tolerance: float, tries: int
) -> Ints:
    """``solve`` for every node of every layer: phy2log [L, R].

    Args:
        members_LNE: the experts of each node; with one node, all of them.
        gpus: GPUs a node.
        floor_L: a load that is good enough, in each layer.
    """
    layers = len(load_LE)
    load_LNE = np.take_along_axis(load_LE, members_LNE.reshape(layers, -1), 1).reshape(members_LNE.shape)
    order_LNE = np.argsort(-load_LNE, axis=2)  # numpy sorts all at once, several times as fast as compiled code
    return _solve_all(load_LNE, order_LNE, members_LNE, gpus, slots, floor_L, tolerance, tries)


@jit
def _solve_all(
    load_LNE: Floats, order_LNE: Ints, members_LNE: Ints, gpus: int, slots: int, floor_L: Floats, tolerance: float,
    tries: int,
) -> Ints:  # fmt: skip
    layers, nodes, _ = members_LNE.shape
    phy2log = np.empty((layers, nodes * gpus * slots), np.int64)
    for layer in range(layers):
        for node in range(nodes):
            members, load_E, order_E = members_LNE[layer, node], load_LNE[layer, node], order_LNE[layer, node]
            settle_ties(load_E, order_E)
            expert_GS = solve(load_E, order_E, gpus, slots, floor_L[layer], tolerance, tries)
            first = node * gpus * slots
            phy2log[layer, first : first + gpus * slots] = members[expert_GS.ravel()]
    return phy2log
