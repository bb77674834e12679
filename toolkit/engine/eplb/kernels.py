"""The inner loops of the planner, for one layer (or the part of it that lives on one node) at a time.

Owns replica counts, packing and swaps. Knows nothing of groups, nodes or maps (planner.py, spill.py do).
Everything here runs compiled or as plain Python (jit.py), with the same result.
E: experts, R: replicas to place, G: GPUs, S: slots a GPU (R = G * S). Loads are of any unit.
Read next: planner.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@jit
def replica_counts(load_E: Floats, replicas: int, cap: int) -> Ints:
    """How many replicas each expert gets so that the largest load of a replica is the least possible, [E].

    Water-filling with a heap: one each, then again and again one more for the expert with the largest load a
    replica; among equals the one with fewest replicas. No expert gets more than ``cap``; E * cap >= replicas.
    """
    experts = len(load_E)
    count_E = np.ones(experts, np.int64)
    key_E = load_E.copy()  # load a replica; -1 when capped
    if cap <= 1:
        key_E[:] = -1.0
    heap = np.arange(experts)
    for root in range(experts // 2 - 1, -1, -1):
        _sift_experts(heap, root, key_E, count_E)
    for _ in range(replicas - experts):
        top = heap[0]
        count_E[top] += 1
        key_E[top] = load_E[top] / count_E[top] if count_E[top] < cap else -1.0
        _sift_experts(heap, 0, key_E, count_E)
    return count_E


@jit
def _sift_experts(heap: Ints, root: int, key_E: Floats, count_E: Ints) -> None:
    size, item = len(heap), heap[root]
    while True:
        child = 2 * root + 1
        if child >= size:
            break
        if child + 1 < size and _needs_more(heap[child + 1], heap[child], key_E, count_E):
            child += 1
        if not _needs_more(heap[child], item, key_E, count_E):
            break
        heap[root] = heap[child]
        root = child
    heap[root] = item


@jit
def _needs_more(a: int, b: int, key_E: Floats, count_E: Ints) -> bool:
    if key_E[a] != key_E[b]:
        return bool(key_E[a] > key_E[b])
    if count_E[a] != count_E[b]:
        return bool(count_E[a] < count_E[b])
    return a < b


@jit
def pack(expert_R: Ints, load_R: Floats, slots: int, expert_GS: Ints, load_GS: Floats, load_G: Floats) -> None:
    """Longest first: each replica to the least loaded GPU with a free slot, and not beside its own copy if possible.

    ``expert_R`` and ``load_R`` are sorted by load, largest first, replicas of an expert side by side. Fills the three
    arrays of the GPUs. Among equally loaded GPUs the one with most free slots is taken.
    """
    gpus = len(load_G)
    load_G[:] = 0.0
    held_G = np.zeros(gpus, np.int64)
    heap = np.arange(gpus)
    size = gpus
    aside = np.empty(gpus, np.int64)
    for index in range(len(expert_R)):
        expert, waiting = expert_R[index], 0
        while True:
            gpu = heap[0]
            duplicate = held_G[gpu] > 0 and expert_GS[gpu, held_G[gpu] - 1] == expert
            if not duplicate or size == 1:
                break
            aside[waiting] = gpu
            waiting += 1
            size -= 1
            heap[0] = heap[size]
            _sift_gpus(heap, size, load_G, held_G)
        if duplicate and waiting:  # every GPU with room holds it already: the least loaded of them
            aside[waiting] = gpu
            gpu, aside[0] = aside[0], gpu
            heap[0] = gpu
        expert_GS[gpu, held_G[gpu]] = expert
        load_GS[gpu, held_G[gpu]] = load_R[index]
        load_G[gpu] += load_R[index]
        held_G[gpu] += 1
        if held_G[gpu] == slots:
            size -= 1
            heap[0] = heap[size]
        _sift_gpus(heap, size, load_G, held_G)
        for position in range(waiting):
            size = _push_gpu(heap, size, aside[position], load_G, held_G)


@jit
def _lighter(a: int, b: int, load_G: Floats, held_G: Ints) -> bool:
    if load_G[a] != load_G[b]:
        return bool(load_G[a] < load_G[b])
    if held_G[a] != held_G[b]:
        return bool(held_G[a] < held_G[b])
    return a < b


@jit
def _sift_gpus(heap: Ints, size: int, load_G: Floats, held_G: Ints) -> None:
    if size < 1:
        return
    item, root = heap[0], 0
    while True:
        child = 2 * root + 1
        if child >= size:
            break
        if child + 1 < size and _lighter(heap[child + 1], heap[child], load_G, held_G):
            child += 1
        if not _lighter(heap[child], item, load_G, held_G):
            break
        heap[root] = heap[child]
        root = child
    heap[root] = item


@jit
def _push_gpu(heap: Ints, size: int, gpu: int, load_G: Floats, held_G: Ints) -> int:
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if not _lighter(gpu, heap[parent], load_G, held_G):
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = gpu
    return size + 1


@jit
def holds(expert_GS: Ints, gpu: int, expert: int) -> bool:
    """Whether a GPU has a replica of an expert."""
    for slot in range(expert_GS.shape[1]):  # noqa: SIM110  (a generator is not compiled)
        if expert_GS[gpu, slot] == expert:
            return True
    return False


@jit
def best_swap(
    expert_GS: Ints, load_GS: Floats, load_G: Floats, heavy: int, other: int, best: float, target: float
) -> tuple[int, int, float]:
    """The swap between two GPUs that leaves the larger of their loads smallest; it must be below ``best``.

    Returns (slot of ``heavy``, slot of ``other``, the larger load), slots -1 when there is none. Stops at the first
    that gets to ``target``. A swap never brings two replicas of an expert together.
    """
    mine, theirs = -1, -1
    high, low = load_G[heavy], load_G[other]
    for i in range(expert_GS.shape[1]):
        for j in range(expert_GS.shape[1]):
            delta = load_GS[heavy, i] - load_GS[other, j]
            if delta <= 0.0:
                continue
            after = max(high - delta, low + delta)
            if after < best and not (
                holds(expert_GS, other, expert_GS[heavy, i]) or holds(expert_GS, heavy, expert_GS[other, j])
            ):
                mine, theirs, best = i, j, after
                if best <= target:
                    return mine, theirs, best
    return mine, theirs, best


@jit
def apply_swap(
    expert_GS: Ints, load_GS: Floats, load_G: Floats, one: int, slot: int, other: int, other_slot: int
) -> None:
    """Exchanges two replicas."""
    delta = load_GS[one, slot] - load_GS[other, other_slot]
    load_G[one] -= delta
    load_G[other] += delta
    expert, load = expert_GS[one, slot], load_GS[one, slot]
    expert_GS[one, slot], load_GS[one, slot] = expert_GS[other, other_slot], load_GS[other, other_slot]
    expert_GS[other, other_slot], load_GS[other, other_slot] = expert, load


@jit
def level(expert_GS: Ints, load_GS: Floats, load_G: Floats, target: float, max_swaps: int) -> int:
    """Swaps replicas of the heaviest GPU until it carries no more than ``target`` or nothing helps; swaps made.

    The lightest GPU is tried first: it nearly always has a replica that fits. Only else all are searched.
    """
    gpus = len(load_G)
    for swaps in range(max_swaps):
        heavy, light = int(np.argmax(load_G)), int(np.argmin(load_G))
        high = load_G[heavy]
        if high <= target:
            return swaps
        bar = high * (1.0 - 1e-9)
        partner = light
        mine, theirs, after = best_swap(expert_GS, load_GS, load_G, heavy, light, bar, target)
        if mine < 0 or after > target:
            for other in range(gpus):
                if other in (heavy, light):
                    continue
                i, j, reached = best_swap(expert_GS, load_GS, load_G, heavy, other, after, target)
                if i >= 0:
                    mine, theirs, after, partner = i, j, reached, other
                    if after <= target:
                        break
        if mine < 0:
            return swaps
        apply_swap(expert_GS, load_GS, load_G, heavy, mine, partner, theirs)
    return max_swaps


@jit
def expand(load_E: Floats, count_E: Ints, expert_R: Ints, load_R: Floats) -> None:
    """The replicas of all experts, largest load first, replicas of an expert side by side."""
    share_E = load_E / count_E
    at = 0
    for expert in np.argsort(-share_E):
        for _ in range(count_E[expert]):
            expert_R[at], load_R[at] = expert, share_E[expert]
            at += 1


@jit
def next_random(state: int) -> int:
    """A step of a linear congruential generator (the C standard's); its low bits are poor, use ``state >> 8``."""
    return (state * 1103515245 + 12345) % 2147483648


@jit
def spare_replica(load_E: Floats, count_E: Ints, limit: float, state: int) -> int:
    """An expert, found from a random one on, whose replicas stay under ``limit`` with one less; -1: none."""
    experts = len(load_E)
    first = (state >> 8) % experts
    for step in range(experts):
        expert = (first + step) % experts
        if count_E[expert] > 1 and load_E[expert] / (count_E[expert] - 1) < limit:
            return expert
    return -1
