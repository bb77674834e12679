"""One layer from loads to placement: counts, packing, and, where packing misses the bound, a search over counts.

Knows nothing of groups and policies. Read next: planner.py.
E: experts, R: replicas, G: GPUs, S: slots a GPU, L: layers, N: nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.bounds import lower_bound
from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import expand, level, next_random, pack, replica_counts, spare_replica

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@jit
def solve(load_E: Floats, gpus: int, slots: int, floor: float, tolerance: float, tries: int) -> Ints:
    """Replicates and packs one layer's experts onto ``gpus`` GPUs of ``slots`` slots, [G, S].

    Aims at max(``floor``, lower bound) * (1 + ``tolerance``). Packing nearly always gets there where GPUs
    have many slots. Where it does not, up to ``tries`` times, a replica goes from an expert that can spare it to one
    of the larger ones, all is packed anew, and what is no worse is kept. The same load gives the same placement.
    """
    experts, replicas = len(load_E), gpus * slots
    cap = max(gpus, -(-replicas // experts))
    count_E = replica_counts(load_E, replicas, cap)
    expert_R, load_R = np.empty(replicas, np.int64), np.empty(replicas)
    expert_GS, load_GS, load_G = np.empty((gpus, slots), np.int64), np.empty((gpus, slots)), np.empty(gpus)
    target = max(floor, load_E.sum() / gpus, (load_E / count_E).max()) * (1.0 + tolerance)
    expand(load_E, count_E, expert_R, load_R)
    pack(expert_R, load_R, slots, expert_GS, load_GS, load_G)
    level(expert_GS, load_GS, load_G, target, 8 * gpus)
    best, best_GS, best_E = load_G.max(), expert_GS.copy(), count_E.copy()
    if best > target:
        target = max(target, lower_bound(load_E, gpus, slots) * (1.0 + tolerance))
    state = 1
    for _ in range(tries if replicas > experts else 0):
        if best <= target:
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
        expand(load_E, count_E, expert_R, load_R)
        pack(expert_R, load_R, slots, expert_GS, load_GS, load_G)
        level(expert_GS, load_GS, load_G, target, 8 * gpus)
        if load_G.max() <= best:
            best = load_G.max()
            best_GS[:], best_E[:] = expert_GS, count_E
    return best_GS


@jit
def solve_nodes(
    load_LE: Floats, members_LNE: Ints, gpus: int, slots: int, floor_L: Floats, tolerance: float, tries: int
) -> Ints:
    """``solve`` for every node of every layer: phy2log [L, R].

    Args:
        members_LNE: the experts of each node; with one node, all of them.
        gpus: GPUs a node.
        floor_L: a load that is good enough, in each layer.
    """
    layers, nodes, _ = members_LNE.shape
    phy2log = np.empty((layers, nodes * gpus * slots), np.int64)
    for layer in range(layers):
        for node in range(nodes):
            members = members_LNE[layer, node]
            expert_GS = solve(load_LE[layer][members], gpus, slots, floor_L[layer], tolerance, tries)
            first = node * gpus * slots
            phy2log[layer, first : first + gpus * slots] = members[expert_GS.ravel()]
    return phy2log
