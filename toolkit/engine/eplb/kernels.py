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
def descending(load_E: Floats) -> Ints:
    """Experts by load, largest first; among equals the first."""
    order_E = np.argsort(-load_E)
    settle_ties(load_E, order_E)
    return order_E


@jit
def settle_ties(load_E: Floats, order_E: Ints) -> None:
    """Puts experts of equal load in ascending order: how a sort leaves them depends on the machine."""
    for index in range(1, len(order_E)):
        expert, at = order_E[index], index
        while at > 0 and order_E[at - 1] > expert and load_E[order_E[at - 1]] == load_E[expert]:
            order_E[at] = order_E[at - 1]
            at -= 1
        order_E[at] = expert


@jit
def replica_counts(load_E: Floats, order_E: Ints, replicas: int, cap: int) -> Ints:
    """How many replicas each expert gets so that the largest load of a replica is the least possible, [E].

    Water-filling: one each, then again and again one more for the expert with the largest load a replica; among
    equals the one with fewest replicas. No expert gets more than ``cap``; E * cap >= replicas. ``order_E`` is
    ``descending``: those with several are its first, and they alone are in a heap.
    """
    experts = len(load_E)
    count_E = np.ones(experts, np.int64)
    key_E = np.empty(experts)  # load a replica, of those in the heap; -1 when capped
    heap, size = np.empty(experts, np.int64), 0
    for _ in range(replicas - experts):
        if size == 0 or (size < experts and load_E[order_E[size]] >= key_E[heap[0]]):
            expert = order_E[size]
            count_E[expert] = 2
            key_E[expert] = load_E[expert] / 2 if cap > 2 else -1.0
            size = _push(heap, size, expert, key_E, count_E)
            continue
        top = heap[0]
        count_E[top] += 1
        key_E[top] = load_E[top] / count_E[top] if count_E[top] < cap else -1.0
        _sift(heap, size, key_E, count_E)
    return count_E


@jit
def _push(heap: Ints, size: int, item: int, key_E: Floats, count_E: Ints) -> int:
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if not _needs_more(item, heap[parent], key_E, count_E):
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = item
    return size + 1


@jit
def _sift(heap: Ints, size: int, key_E: Floats, count_E: Ints) -> None:
    item, root = heap[0], 0
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
    arrays of the GPUs. Among equally loaded GPUs the one with most free slots is taken. GPUs are few: looking at all
    of them is faster than a heap.
    """
    gpus = len(load_G)
    load_G[:] = 0.0
    held_G, last_G, key_G = np.zeros(gpus, np.int64), np.full(gpus, -1), np.zeros(gpus)  # key: infinite when full
    for index in range(len(expert_R)):
        expert, load = expert_R[index], load_R[index]
        gpu = _lightest(key_G, held_G, last_G, -2)
        if last_G[gpu] == expert:
            other = _lightest(key_G, held_G, last_G, expert)
            gpu = other if other >= 0 else gpu  # else every GPU with room holds it already: the least loaded of them
        held = held_G[gpu]
        expert_GS[gpu, held], load_GS[gpu, held] = expert, load
        load_G[gpu] += load
        held_G[gpu], last_G[gpu] = held + 1, expert
        key_G[gpu] = load_G[gpu] if held + 1 < slots else np.inf


@jit
def _lightest(key_G: Floats, held_G: Ints, last_G: Ints, without: int) -> int:
    """The GPU with the least load among those whose last expert is another than ``without``; -1: none has room."""
    best, least = -1, np.inf
    for gpu in range(len(key_G)):
        key = key_G[gpu]
        if key <= least and last_G[gpu] != without and key < np.inf and (key < least or held_G[gpu] < held_G[best]):
            best, least = gpu, key
    return best


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
def expand(load_E: Floats, count_E: Ints, order_E: Ints, expert_R: Ints, load_R: Floats) -> None:
    """The replicas of all experts, largest load first, replicas of an expert side by side.

    ``order_E`` is ``descending``: experts with one replica are in order, the few with more are sorted among them.
    """
    experts = len(load_E)
    share_V, several_V, many = np.empty(experts), np.empty(experts, np.int64), 0
    for expert in order_E:
        if count_E[expert] > 1:
            share, at = load_E[expert] / count_E[expert], many
            while at > 0 and share_V[at - 1] < share:
                share_V[at], several_V[at] = share_V[at - 1], several_V[at - 1]
                at -= 1
            share_V[at], several_V[at] = share, expert
            many += 1
    at, v = 0, 0
    for index in range(experts + 1):
        expert = order_E[index] if index < experts else -1
        if expert >= 0 and count_E[expert] > 1:
            continue
        while v < many and (expert < 0 or share_V[v] > load_E[expert]):
            for _ in range(count_E[several_V[v]]):
                expert_R[at], load_R[at] = several_V[v], share_V[v]
                at += 1
            v += 1
        if expert >= 0:
            expert_R[at], load_R[at] = expert, load_E[expert]
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
