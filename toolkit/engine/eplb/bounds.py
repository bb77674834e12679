"""A proven lower bound of the largest GPU load that any placement of one layer can have.

max(mean, largest replica) comes first. Where GPUs have few slots that cannot be reached, because a GPU with a large
replica still has to fill its other slots: ``lower_bound`` counts that too. It holds for placements in which no GPU
holds an expert twice. Read next: kernels.py.
E: experts, G: GPUs, S: slots a GPU, R = G * S replicas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import replica_counts

Floats = NDArray[np.float64]

STEPS = 12
"""Halvings of the interval in which the bound lies; it starts at most as wide as the bound."""


@jit
def simple_bound(load_E: Floats, gpus: int, slots: int) -> float:
    """max(mean, least possible largest replica)."""
    replicas = gpus * slots
    cap = max(gpus, -(-replicas // len(load_E)))
    return float(max(load_E.sum() / gpus, (load_E / replica_counts(load_E, replicas, cap)).max()))


@jit
def lower_bound(load_E: Floats, gpus: int, slots: int) -> float:
    """The largest load that can be proven unavoidable, at least ``simple_bound``; all bisected loads are."""
    low = simple_bound(load_E, gpus, slots)
    if slots == 1 or slots > len(load_E) or low <= 0.0 or possible(load_E, gpus, slots, low * (1.0 + 1e-9)):
        return low
    high = 2.0 * low
    if not possible(load_E, gpus, slots, high):
        return high
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        if possible(load_E, gpus, slots, middle):
            high = middle
        else:
            low = middle
    return low


@jit
def possible(load_E: Floats, gpus: int, slots: int, limit: float) -> bool:
    """False only when no placement keeps all GPUs within ``limit``.

    Let f be a load that any S - 1 replicas of different experts have at least. Then a replica may weigh limit - f at
    most, so expert e needs ceil(load_e / (limit - f)) replicas. What the counts leave of the redundant slots can make
    the smallest experts' replicas smaller: that gives the next, larger f. Repeated until nothing changes.
    """
    spare_slots = gpus * slots - len(load_E)
    small = np.sort(load_E)[: slots - 1]
    fill = 0.0
    while True:
        largest = limit - fill
        if largest <= 0.0:
            return False
        spare = spare_slots
        for load in load_E:
            if load > largest:
                need = int(np.ceil(load / largest * (1.0 - 1e-12)))
                if need > gpus:
                    return False
                spare -= need - 1
        if spare < 0:
            return False
        # Split experts' replicas are larger than largest / 2, so the smallest are among the others if this holds.
        if small[-1] > 0.5 * largest:
            return True
        after = least_fill(small, spare)
        if after <= fill * (1.0 + 1e-9):
            return True
        fill = after


@jit
def least_fill(small: Floats, spare: int) -> float:
    """Least sum of one replica of each of the ``small`` experts, when ``spare`` redundant slots can split them."""
    count = np.ones(len(small))
    for _ in range(spare):
        count[np.argmax(small / count - small / (count + 1.0))] += 1.0
    return float((small / count).sum())
