"""Policy ``spill``: every expert keeps a copy on its home node, redundant copies may go anywhere.

The group rule alone leaves a node as loaded as its groups are. Here redundant slots carry the surplus of hot nodes to
cool ones, and only as much as evens them out, because a copy away from home brings traffic between nodes.
One layer at a time; homes come from groups.py, packing inside a node from kernels.py.
E: experts, R: replicas, N: nodes, G: GPUs of a node, S: slots a GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import descending, expand, level, pack, replica_counts, settle_ties

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@jit
def assign_nodes(
    load_E: Floats,
    count_E: Ints,
    order_E: Ints,
    home_E: Ints,
    gpus: int,
    room: int,
    limit: float,
    expert_R: Ints,
    load_R: Floats,
    node_R: Ints,
) -> Floats:
    """Fills ``expert_R``, ``load_R`` (``expand``) and the node of each replica; returns the load of each node, [N].

    The first replica of an expert goes home. A further one stays at home while the node is under ``limit`` and has
    one of its ``room`` redundant slots left, else it goes to the lightest node that has one. A node takes no more
    replicas of an expert than it has ``gpus``, if others have room.
    """
    nodes = int(home_E.max()) + 1
    expand(load_E, count_E, order_E, expert_R, load_R)
    load_N, free_N, held_N = np.zeros(nodes), np.full(nodes, room), np.zeros(nodes, np.int64)
    for expert in range(len(load_E)):
        load_N[home_E[expert]] += load_E[expert] / count_E[expert]
    previous = -1
    for index in range(len(expert_R)):
        expert = expert_R[index]
        home = home_E[expert]
        if expert != previous:
            node_R[index], previous = home, expert
            held_N[:] = 0
            held_N[home] = 1
            continue
        node = home
        if not free_N[home] or held_N[home] >= gpus or load_N[home] + load_R[index] > limit:
            node = -1
            for other in range(nodes):
                if not free_N[other]:
                    continue
                full, best_full = held_N[other] >= gpus, node >= 0 and held_N[node] >= gpus
                if node < 0 or (not full and best_full) or (full == best_full and load_N[other] < load_N[node]):
                    node = other
        node_R[index] = node
        load_N[node] += load_R[index]
        free_N[node] -= 1
        held_N[node] += 1
    return load_N


@jit
def merged(priced_E: Floats, queue_NE: Ints, length_N: Ints) -> Ints:
    """``descending`` by price: a node has one price, so its experts keep their order, and nodes are merged."""
    order_E, at_N = np.empty(len(priced_E), np.int64), np.zeros(len(length_N), np.int64)
    for index in range(len(order_E)):
        best, dearest = -1, -1.0
        for node in range(len(length_N)):
            if at_N[node] < length_N[node] and priced_E[queue_NE[node, at_N[node]]] > dearest:
                best, dearest = node, priced_E[queue_NE[node, at_N[node]]]
        order_E[index] = queue_NE[best, at_N[best]]
        at_N[best] += 1
    settle_ties(priced_E, order_E)
    return order_E


@jit
def spill_layer(
    load_E: Floats, home_E: Ints, gpus: int, slots: int, bound: float, tolerance: float, tries: int
) -> Ints:
    """phy2log of one layer, [R].

    Args:
        home_E: home node of each expert, as many on each node.
        gpus: GPUs a node.
        bound: least possible GPU load; nodes are levelled to its multiple, then the GPUs of each node.
    """
    experts, nodes = len(load_E), int(home_E.max()) + 1
    replicas, a_node = nodes * gpus * slots, gpus * slots
    room, cap = a_node - experts // nodes, max(nodes * gpus, -(-nodes * gpus * slots // experts))
    expert_R, load_R, node_R = np.empty(replicas, np.int64), np.empty(replicas), np.empty(replicas, np.int64)
    limit = bound * gpus * (1.0 + tolerance)
    price_N = np.ones(nodes)
    best, best_E = np.inf, np.ones(experts, np.int64)
    order_E = descending(load_E)
    queue_NE, length_N = np.empty((nodes, experts), np.int64), np.zeros(nodes, np.int64)
    for expert in order_E:
        queue_NE[home_E[expert], length_N[home_E[expert]]] = expert
        length_N[home_E[expert]] += 1
    for _ in range(tries):
        priced_E = load_E * price_N[home_E]
        count_E = replica_counts(priced_E, merged(priced_E, queue_NE, length_N), replicas, cap)
        load_N = assign_nodes(load_E, count_E, order_E, home_E, gpus, room, limit, expert_R, load_R, node_R)
        heaviest = max(load_N.max(), (load_E / count_E).max() * gpus)
        if heaviest < best:
            best, best_E = heaviest, count_E
        if best <= limit:
            break
        price_N *= (load_N / load_N.mean()) ** 2
    assign_nodes(load_E, best_E, order_E, home_E, gpus, room, limit, expert_R, load_R, node_R)
    phy2log = np.empty(replicas, np.int64)
    expert_GS, load_GS, load_G = np.empty((gpus, slots), np.int64), np.empty((gpus, slots)), np.empty(gpus)
    for node in range(nodes):
        here = node_R == node
        pack(expert_R[here], load_R[here], slots, expert_GS, load_GS, load_G)
        level(expert_GS, load_GS, load_G, bound * (1.0 + tolerance), 8 * gpus)
        phy2log[node * a_node : (node + 1) * a_node] = expert_GS.ravel()
    return phy2log


def off_home_share(load_LE: Floats, phy2log_LR: Ints, home_LE: Ints, nodes: int) -> Floats:
    """Part of each layer's load that goes to replicas away from their expert's home node, [L]; 0 without load."""
    layers, replicas = phy2log_LR.shape
    rows = np.arange(layers)[:, None]
    count_LE = np.stack([np.bincount(row, minlength=load_LE.shape[1]) for row in phy2log_LR])
    share_LR = (load_LE / count_LE)[rows, phy2log_LR]
    away_LR = home_LE[rows, phy2log_LR] != np.arange(replicas) // (replicas // nodes)
    total_L = load_LE.sum(1)
    away: Floats = (share_LR * away_LR).sum(1) / np.where(total_L > 0, total_L, 1.0)
    return away
