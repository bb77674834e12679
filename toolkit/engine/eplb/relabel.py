"""Renames the GPUs (and nodes) of a new placement so that most of what they hold is there already.

Which GPU is called which does not change how balanced a placement is, but decides how many experts have to move.
An assignment problem, solved exactly (Hungarian method) for each layer. Knows nothing of loads.
L: layers, R: slots, G: GPUs, E: experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def relabel(prev_LR: Ints, new_LR: Ints, gpus: int, nodes: int) -> Ints:
    """``new_LR`` with GPUs renamed, and slots of a GPU ordered, to leave as many slots as possible as they were.

    Args:
        nodes: more than 1: GPUs that share a node stay together, so that what holds for a node's set still holds.
            The nodes are matched first, then GPUs inside them.
    """
    experts = int(max(prev_LR.max(), new_LR.max())) + 1
    slots = prev_LR.shape[1] // gpus
    out = np.empty_like(new_LR)
    for layer, (prev_R, new_R) in enumerate(zip(prev_LR, new_LR)):
        node_of = _match(_held(prev_R, nodes, experts), _held(new_R, nodes, experts))
        new_NG = new_R.reshape(nodes, gpus // nodes, slots)
        prev_NG = prev_R.reshape(nodes, gpus // nodes, slots)
        rows = []
        for node in range(nodes):
            candidates = new_NG[node_of[node]]
            gpu_of = _match(
                _held(prev_NG[node].ravel(), gpus // nodes, experts), _held(candidates.ravel(), gpus // nodes, experts)
            )
            rows += [keep_slots(before, candidates[gpu]) for before, gpu in zip(prev_NG[node], gpu_of)]
        out[layer] = np.concatenate(rows)
    return out


def keep_slots(prev_S: Ints, new_S: Ints) -> Ints:
    """The experts of one GPU, ``new_S``, each in the slot where it was if it was there."""
    left = new_S.tolist()
    out = np.full_like(prev_S, -1)
    for slot, expert in enumerate(prev_S.tolist()):
        if expert in left:
            left.remove(expert)
            out[slot] = expert
    out[out < 0] = left
    return out


def moved(prev_LR: Ints, new_LR: Ints, gpus: int) -> Ints:
    """Slots of each layer that need an expert which their GPU does not hold yet, [L]."""
    layers, replicas = prev_LR.shape
    count = np.zeros(layers, np.int64)
    for layer in range(layers):
        for before, after in zip(prev_LR[layer].reshape(gpus, -1), new_LR[layer].reshape(gpus, -1)):
            count[layer] += replicas // gpus - np.isin(after, before).sum()
    return count


def _held(expert_R: Ints, parts: int, experts: int) -> Ints:
    """How many replicas of each expert each part (GPU or node) holds, [parts, E]."""
    owner = np.repeat(np.arange(parts), len(expert_R) // parts)
    return np.bincount(owner * experts + expert_R, minlength=parts * experts).reshape(parts, experts)


def _match(before: Ints, after: Ints) -> Ints:
    """For each part of ``before`` the part of ``after`` that is best put in its place: the largest common sum."""
    if len(before) == 1:
        return np.zeros(1, np.int64)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ValueError("keeping experts in place (prev) needs scipy: pip install 'wideep-toolkit[eplb]'") from None
    common = before @ after.T  # replicas beside their own copy are rare, so the product counts the common ones
    rows: Ints = linear_sum_assignment(common, maximize=True)[1]
    return rows
