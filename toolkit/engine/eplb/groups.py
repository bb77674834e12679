"""Which node is the home of which expert group.

With group-limited routing a token's experts come from few groups, so a group that lives on one node saves traffic
between nodes. Searches all ways where they are few (105 for 8 groups on 4 nodes), else packs and swaps.
Knows nothing of GPUs inside a node beyond their number. Bounds are of bounds.py. Read next: planner.py.
L: layers, K: groups, N: nodes, E: experts, T: partitions of the groups.
"""

from __future__ import annotations

from functools import lru_cache
from math import factorial

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.bounds import lower_bound, simple_bound
from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import level, pack

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEW = 5000
"""Partitions up to which all are tried."""


def home_nodes(load_LE: Floats, groups: int, nodes: int, replicas: int, gpus: int) -> tuple[Ints, Floats]:
    """Home node of each group and a lower bound of the largest GPU load under the group rule, [L, K] and [L].

    The homes are those that imply the least bound. It holds for every placement that keeps groups together, as all
    partitions were tried; where they are too many for that, it is the bound without the rule.
    """
    load_LK = load_LE.reshape(len(load_LE), groups, -1).sum(-1)
    if _partitions(groups, nodes) <= FEW:
        order_LE = np.argsort(-load_LE, axis=1)  # ties do not matter here
        return _best_partition(load_LE, order_LE, load_LK, _all_partitions(groups, nodes), nodes, replicas, gpus)
    home_LK = np.stack([_packed_groups(load_K, nodes) for load_K in load_LK])
    return home_LK, global_bound(load_LE, replicas, gpus, np.full(len(load_LE), np.inf), 0.0)


def members_of(home_LK: Ints, nodes: int, experts: int) -> Ints:
    """The experts at home on each node, [L, N, E / N], in ascending order."""
    layers, groups = home_LK.shape
    a_group = experts // groups
    order_LK = np.argsort(home_LK, axis=1, kind="stable")
    members: Ints = (order_LK[:, :, None] * a_group + np.arange(a_group)).reshape(layers, nodes, experts // nodes)
    return members


def global_bound(load_LE: Floats, replicas: int, gpus: int, reached_L: Floats, tolerance: float) -> Floats:
    """Lower bound of the largest GPU load when any replica may go anywhere, [L].

    Where ``reached_L`` is within ``tolerance`` of the simple bound there is nothing to gain from a better one.
    """
    order_LE = np.argsort(-load_LE, axis=1)  # ties do not matter here
    return _global_bound(load_LE, order_LE, replicas, gpus, reached_L, tolerance)


@jit
def _global_bound(
    load_LE: Floats, order_LE: Ints, replicas: int, gpus: int, reached_L: Floats, tolerance: float
) -> Floats:
    bound_L, slots = np.empty(len(load_LE)), replicas // gpus
    for layer in range(len(load_LE)):
        bound_L[layer] = simple_bound(load_LE[layer], order_LE[layer], gpus, slots)
        if reached_L[layer] > bound_L[layer] * (1.0 + tolerance):
            bound_L[layer] = lower_bound(load_LE[layer], gpus, slots, bound_L[layer])
    return bound_L


def _partitions(groups: int, nodes: int) -> int:
    each = groups // nodes
    ways: int = factorial(groups) // (factorial(each) ** nodes * factorial(nodes))
    return ways


@lru_cache(maxsize=8)
def _all_partitions(groups: int, nodes: int) -> Ints:
    """Every way to put groups on equal nodes, G / N each, [T, K]; nodes that only swap names count once."""
    found: list[list[int]] = []

    def place(homes: list[int], room: list[int]) -> None:
        if len(homes) == groups:
            found.append(homes)
            return
        for node in range(min(max(homes, default=-1) + 2, nodes)):
            if room[node]:
                place([*homes, node], [free - (other == node) for other, free in enumerate(room)])

    place([], [groups // nodes] * nodes)
    return np.array(found, np.int64)


@jit
def _best_partition(
    load_LE: Floats, order_LE: Ints, load_LK: Floats, home_TK: Ints, nodes: int, replicas: int, gpus: int
) -> tuple[Ints, Floats]:
    layers, groups = load_LK.shape
    a_group = load_LE.shape[1] // groups
    node_gpus, slots = gpus // nodes, replicas // gpus
    load_NE = np.empty((nodes, groups // nodes * a_group))
    home_LK, bound_L = np.empty((layers, groups), np.int64), np.empty(layers)
    heaviest_T, in_order = np.empty(len(home_TK)), np.arange(load_NE.shape[1])
    for layer in range(layers):
        for t in range(len(home_TK)):
            load_N = np.zeros(nodes)
            for group in range(groups):
                load_N[home_TK[t, group]] += load_LK[layer, group]
            heaviest_T[t] = load_N.max() / node_gpus
        best, chosen = np.inf, 0
        for t in np.argsort(heaviest_T):
            if heaviest_T[t] >= best:
                break
            filled_N = np.zeros(nodes, np.int64)
            for expert in order_LE[layer]:
                node = home_TK[t, expert // a_group]
                load_NE[node, filled_N[node]] = load_LE[layer, expert]
                filled_N[node] += 1
            bound, simple_N = 0.0, np.empty(nodes)
            for node in range(nodes):
                simple_N[node] = simple_bound(load_NE[node], in_order, node_gpus, slots)
                bound = max(bound, simple_N[node])
            for node in range(nodes if bound < best else 0):
                bound = max(bound, lower_bound(load_NE[node], node_gpus, slots, simple_N[node]))
            if bound < best:
                best, chosen = bound, t
        home_LK[layer], bound_L[layer] = home_TK[chosen], best
    return home_LK, bound_L


def _packed_groups(load_K: Floats, nodes: int) -> Ints:
    """Longest first, then swaps: home of each group, [K]."""
    groups = len(load_K)
    order = np.argsort(-load_K, kind="stable")
    held, load, load_N = (
        np.empty((nodes, groups // nodes), np.int64),
        np.empty((nodes, groups // nodes)),
        np.empty(nodes),
    )
    pack(order, load_K[order], groups // nodes, held, load, load_N)
    level(held, load, load_N, load_K.sum() / nodes, 8 * groups)
    home_K = np.empty(groups, np.int64)
    home_K[held] = np.arange(nodes)[:, None]
    return home_K
