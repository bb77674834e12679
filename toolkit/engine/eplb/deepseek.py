"""DeepSeek's EPLB, written anew from its description: the baseline that the planner is compared with.

Replicates the expert with the largest load a replica, packs longest-first without swaps, and knows two modes: with
``groups % nodes == 0`` groups are packed to nodes and everything else happens inside a node; else all is global.
Nothing here is tuned. Its results are those of github.com/deepseek-ai/EPLB; its time depends on what the
loads are held in: see ``Loads``.
L: layers, N: items, E: experts, R: replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats32 = NDArray[np.float32]
Loads = Callable[[Floats32], Any]
"""One layer's loads -> what the packing loop adds and compares. ``list`` of numbers is the fastest; the published
code works on elements of a torch tensor there, ``torch.from_numpy``, which is what its users wait for."""


def as_floats(row: Floats32) -> list[float]:
    """Plain Python numbers."""
    values: list[float] = row.tolist()
    return values


def balanced_packing(weight_LN: Floats32, packs: int, loads: Loads) -> tuple[Ints, Ints]:
    """N items into ``packs`` packs of N / packs each, heaviest first to the lightest pack with room.

    Returns:
        Pack of each item and its place in the pack, both [L, N].
    """
    layers, items = weight_LN.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (layers, 1)), np.zeros((layers, items), np.int64)
    pack_LN, place_LN = np.empty((layers, items), np.int64), np.empty((layers, items), np.int64)
    for layer, order in enumerate(np.argsort(-weight_LN, axis=1, kind="stable")):
        row = loads(weight_LN[layer])
        load: list[Any] = [0] * packs
        held = [0] * packs
        for item in order.tolist():
            pack = min((p for p in range(packs) if held[p] < room), key=load.__getitem__)
            pack_LN[layer, item], place_LN[layer, item] = pack, held[pack]
            load[pack] += row[item]
            held[pack] += 1
    return pack_LN, place_LN


def replicate(weight_LE: Floats32, replicas: int) -> tuple[Ints, Ints]:
    """One replica each, the rest one by one to the expert with the largest load a replica.

    Returns:
        Expert of each replica [L, R]; replicas of each expert [L, E].
    """
    layers, experts = weight_LE.shape
    expert_LR = np.tile(np.arange(replicas), (layers, 1))
    count_LE = np.ones((layers, experts), np.int64)
    rows = np.arange(layers)
    for replica in range(experts, replicas):
        chosen_L = np.argmax(weight_LE / count_LE.astype(np.float32), axis=1)
        expert_LR[:, replica] = chosen_L
        count_LE[rows, chosen_L] += 1
    return expert_LR, count_LE


def deepseek(
    weight_LE: NDArray[np.float64], replicas: int, groups: int, nodes: int, gpus: int, loads: Loads = as_floats
) -> Ints:
    """Placement of DeepSeek's ``rebalance_experts``, phy2log [L, R]; arguments as there and already checked."""
    if groups % nodes:
        groups, nodes = 1, 1
    weight: Floats32 = weight_LE.astype(np.float32)
    layers, experts = weight.shape
    a_group = experts // groups
    pack_LK, place_LK = balanced_packing(weight.reshape(layers, groups, a_group).sum(-1), nodes, loads)
    order_LK = np.argsort(pack_LK * (groups // nodes) + place_LK, axis=1)
    members_LE = (order_LK[:, :, None] * a_group + np.arange(a_group)).reshape(layers, experts)
    members = members_LE.reshape(layers * nodes, experts // nodes)  # a row: the experts of one node in one layer
    load: Floats32 = np.take_along_axis(weight, members_LE, axis=1).reshape(members.shape)
    expert, count = replicate(load, replicas // nodes)
    share: Floats32 = np.take_along_axis((load / count).astype(np.float32), expert, axis=1)
    pack, place = balanced_packing(share, gpus // nodes, loads)
    slot = pack * (replicas // gpus) + place
    ordered = np.take_along_axis(expert, np.argsort(slot, axis=1), axis=1)
    return np.take_along_axis(members, ordered, axis=1).reshape(layers, replicas)
