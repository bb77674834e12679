"""The fewest moves that bring one layer back within a load, from the placement in force.

Two kinds of move: two replicas change places (two experts travel), or a slot changes its expert (one travels: an
expert of the heaviest GPU gets a replica more, or the GPU gives one of its own up). The one with the larger relief for
each expert that travels goes first. Knows nothing of windows and noise. Read next: online.py.
E: experts, R: slots, G: GPUs, S: slots a GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import apply_swap, best_swap, holds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@jit
def slots_of(expert_GS: Ints, count_E: Ints) -> tuple[Ints, Ints]:
    """Flat slots (gpu * S + slot) grouped by expert, [R], and where each expert's begin, [E + 1]."""
    start_E = np.zeros(len(count_E) + 1, np.int64)
    start_E[1:] = np.cumsum(count_E)
    at_E = start_E[:-1].copy()
    flat_R = np.empty(expert_GS.size, np.int64)
    for gpu in range(expert_GS.shape[0]):
        for slot in range(expert_GS.shape[1]):
            expert = expert_GS[gpu, slot]
            flat_R[at_E[expert]] = gpu * expert_GS.shape[1] + slot
            at_E[expert] += 1
    return flat_R, start_E


@jit
def replacement_load(
    load_E: Floats, count_E: Ints, load_G: Floats, flat_R: Ints, start_E: Ints, slots: int, at: int, old: int, new: int
) -> float:
    """Largest load of the GPUs concerned when flat slot ``at`` changes its expert from ``old`` to ``new``."""
    gpu = at // slots
    more = load_E[old] / (count_E[old] - 1) - load_E[old] / count_E[old]
    less = load_E[new] / count_E[new] - load_E[new] / (count_E[new] + 1)
    worst = load_G[gpu] - load_E[old] / count_E[old] + load_E[new] / (count_E[new] + 1)
    for index in range(start_E[old], start_E[old + 1]):
        other = flat_R[index] // slots
        if other != gpu:
            load = load_G[other] + more
            for twin in range(start_E[new], start_E[new + 1]):
                if flat_R[twin] // slots == other:
                    load -= less
            worst = max(worst, load)
    return float(worst)


@jit
def may_spare(flat_R: Ints, start_E: Ints, expert: int, gpu: int, slots: int, node_gpus: int) -> bool:
    """Whether an expert keeps a replica on the node of ``gpu`` when it loses one there."""
    here = 0
    for index in range(start_E[expert], start_E[expert + 1]):
        if flat_R[index] // slots // node_gpus == gpu // node_gpus:
            here += 1
    return here > 1


@jit
def best_replacement(
    load_E: Floats, count_E: Ints, expert_GS: Ints, load_G: Floats, heavy: int, node_gpus: int
) -> tuple[int, int, float]:
    """The flat slot to change, and its new expert, so that the GPUs concerned end lowest; and what they end at.

    Both the slot and the heaviest GPU are on one node. (-1, -1, its load): no single change helps.
    """
    slots = expert_GS.shape[1]
    flat_R, start_E = slots_of(expert_GS, count_E)
    best, best_at, best_new = load_G[heavy] * (1.0 - 1e-9), -1, -1
    first = heavy // node_gpus * node_gpus
    for gpu in range(first, first + node_gpus):
        for slot in range(slots):
            old = expert_GS[gpu, slot]
            if count_E[old] < 2 or not may_spare(flat_R, start_E, old, gpu, slots, node_gpus):
                continue
            at = gpu * slots + slot
            # The heaviest GPU may give its own slot to an expert of any other; others take one of its experts.
            begin, end = (first, first + node_gpus) if gpu == heavy else (heavy, heavy + 1)
            for other in range(begin, end):
                for its in range(slots):
                    new = expert_GS[other, its]
                    if new == old or holds(expert_GS, gpu, new):
                        continue
                    if gpu == heavy:
                        after = 0.0
                    else:
                        after = _relieved(load_E, count_E, expert_GS, load_G, heavy, old, new)
                        if after >= best:
                            continue
                    after = max(after, replacement_load(load_E, count_E, load_G, flat_R, start_E, slots, at, old, new))
                    if after < best:
                        best, best_at, best_new = after, at, new
    return best_at, best_new, best


@jit
def _relieved(load_E: Floats, count_E: Ints, expert_GS: Ints, load_G: Floats, gpu: int, old: int, new: int) -> float:
    """Load of a GPU that holds ``new`` when ``new`` gets a replica elsewhere in the slot of one of ``old``'s."""
    load = load_G[gpu] - load_E[new] / count_E[new] + load_E[new] / (count_E[new] + 1)
    if holds(expert_GS, gpu, old):
        load += load_E[old] / (count_E[old] - 1) - load_E[old] / count_E[old]
    return float(load)


@jit
def refresh(load_E: Floats, count_E: Ints, expert_GS: Ints, load_GS: Floats, load_G: Floats) -> None:
    """Loads of slots and GPUs from what the slots hold."""
    for gpu in range(expert_GS.shape[0]):
        load_G[gpu] = 0.0
        for slot in range(expert_GS.shape[1]):
            load_GS[gpu, slot] = load_E[expert_GS[gpu, slot]] / count_E[expert_GS[gpu, slot]]
            load_G[gpu] += load_GS[gpu, slot]


@jit
def improve(
    load_E: Floats, expert_GS: Ints, aim: float, target: float, max_moves: int, node_gpus: int, reached_M: Floats
) -> int:
    """Changes ``expert_GS`` until no GPU carries more than ``target``; experts that travelled.

    Stops early when ``max_moves`` are used up or nothing helps. Replicas stay on their node of ``node_gpus`` GPUs.
    With fewer ``max_moves`` it takes the same way, less far.

    Args:
        reached_M: gets the load of the heaviest GPU after each number of moves, [max_moves + 1]; NaN where the way has
            no stop.
    """
    gpus, slots = expert_GS.shape
    count_E = np.zeros(len(load_E), np.int64)
    for expert in expert_GS.ravel():
        count_E[expert] += 1
    load_GS, load_G = np.empty((gpus, slots)), np.empty(gpus)
    refresh(load_E, count_E, expert_GS, load_GS, load_G)
    moves = 0
    reached_M[:] = np.nan
    reached_M[0] = load_G.max()
    while moves < max_moves:
        heavy = int(np.argmax(load_G))
        high = load_G[heavy]
        if high <= target:
            break
        first = heavy // node_gpus * node_gpus
        mine, theirs, partner, swapped = -1, -1, -1, high * (1.0 - 1e-9)
        for other in range(first, first + node_gpus):
            if other != heavy:
                i, j, after = best_swap(expert_GS, load_GS, load_G, heavy, other, swapped, aim)
                if i >= 0:
                    mine, theirs, partner, swapped = i, j, other, after
        at, new, replaced = best_replacement(load_E, count_E, expert_GS, load_G, heavy, node_gpus)
        gain_swap = (high - max(swapped, aim)) / 2.0 if mine >= 0 and moves + 2 <= max_moves else 0.0
        gain_replacement = high - max(replaced, aim) if at >= 0 else 0.0
        if max(gain_swap, gain_replacement) <= 0.0:
            break
        if gain_replacement >= gain_swap:
            gpu, slot = at // slots, at % slots
            count_E[expert_GS[gpu, slot]] -= 1
            count_E[new] += 1
            expert_GS[gpu, slot] = new
            refresh(load_E, count_E, expert_GS, load_GS, load_G)
            moves += 1
        else:
            apply_swap(expert_GS, load_GS, load_G, heavy, mine, partner, theirs)
            moves += 2
        reached_M[moves] = load_G.max()
    return moves
