"""A proven lower bound of the largest GPU load that any placement of one layer can have.

max(mean, largest replica) comes first. Where GPUs have few slots that cannot be reached, because a GPU with a large
replica still has to fill its other slots: ``lower_bound`` counts that too, first for one GPU (``possible``), then for
all GPUs with a large replica together, which share the small ones (``crowded``). It holds for placements in which no
GPU holds an expert twice. Read next: kernels.py.
E: experts, G: GPUs, S: slots a GPU, R = G * S replicas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.kernels import replica_counts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CROWDS = 6
"""Sizes of large replicas, from the largest on, that are looked at."""

STEPS = 12
"""Halvings of the interval in which the bound lies; it starts at most as wide as the bound."""


@jit
def simple_bound(load_E: Floats, order_E: Ints, gpus: int, slots: int) -> float:
    """max(mean, least possible largest replica); ``order_E`` is ``kernels.descending``."""
    replicas = gpus * slots
    cap = max(gpus, -(-replicas // len(load_E)))
    count_E = replica_counts(load_E, order_E, replicas, cap)
    return float(max(load_E.sum() / gpus, (load_E / count_E).max()))


@jit
def lower_bound(load_E: Floats, gpus: int, slots: int, low: float) -> float:
    """The largest load that can be proven unavoidable, at least ``low``, the simple one; all bisected loads are."""
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
            return not crowded(load_E, gpus, slots, limit, largest)
        after = least_fill(small, spare)
        if after <= fill * (1.0 + 1e-9):
            return not crowded(load_E, gpus, slots, limit, largest)
        fill = after


@jit
def crowded(load_E: Floats, gpus: int, slots: int, limit: float, largest: float) -> bool:
    """True when the GPUs that hold the largest replicas cannot all stay within ``limit``; none may exceed ``largest``.

    Take the replicas of at least v, v > limit / 2: each is on a GPU of its own. If they are j, these GPUs' other
    (S - 1) j slots hold at least as much as the (S - 1) j - s smallest experts, where s redundant slots are left to
    split those. So the heavy experts' whole load plus that is at most j * limit. How the redundant slots are used is
    open: an expert of load l stays heavy with up to floor(l / v) replicas, or has more and is not. A table over
    (redundant slots used, j) holds the least heavy load of all such choices; if none keeps the limit, none exists.
    """
    order = np.argsort(-load_E)
    spare = gpus * slots - len(load_E)
    smallest = np.zeros(len(load_E) + 1)
    smallest[1:] = np.cumsum(load_E[order[::-1]])
    below = largest * (1.0 + 1e-9)
    for _ in range(CROWDS):
        v = 0.0  # the next smaller size that a replica of a large expert can have
        for expert in order:
            if load_E[expert] <= 0.5 * limit:
                break
            count = max(1, int(np.ceil(load_E[expert] / below * (1.0 + 1e-12))))
            if load_E[expert] / count >= below * (1.0 - 1e-12):
                count += 1
            v = max(v, load_E[expert] / count)
        if v <= 0.5 * limit:
            return False
        if not _heavy_fit(load_E, order, smallest, gpus, slots, spare, limit, largest, v * (1.0 - 1e-9)):
            return True
        below = v
    return False


@jit
def _heavy_fit(
    load_E: Floats, order: Ints, smallest: Floats, gpus: int, slots: int, spare: int, limit: float, largest: float,
    v: float,
) -> bool:  # fmt: skip
    """Whether some use of the ``spare`` slots keeps the GPUs with replicas of at least ``v`` within ``limit``."""
    least = np.full((spare + 1, gpus + 1), np.inf)
    least[0, 0] = 0.0
    for expert in order:
        load = load_E[expert]
        if load < v:
            break
        need = max(1, int(np.ceil(load / largest * (1.0 - 1e-12))))
        most = int(load / v)  # more replicas are lighter than v
        after = np.full((spare + 1, gpus + 1), np.inf)
        for used in range(spare + 1):
            for heavy in range(gpus + 1):
                now = least[used, heavy]
                if now == np.inf:
                    continue
                for count in range(need, most + 1):
                    if used + count - 1 <= spare and heavy + count <= gpus:
                        after[used + count - 1, heavy + count] = min(after[used + count - 1, heavy + count], now + load)
                light = max(need, most + 1)
                if used + light - 1 <= spare:
                    after[used + light - 1, heavy] = min(after[used + light - 1, heavy], now)
        least = after
    for used in range(spare + 1):
        if least[used, 0] < np.inf:
            return True
        for heavy in range(1, gpus + 1):
            if least[used, heavy] == np.inf:
                continue
            fillers = (slots - 1) * heavy - (spare - used)
            if fillers > 0 and smallest[min(fillers, len(load_E))] - smallest[min(fillers, len(load_E)) - 1] > 0.5 * v:
                return True  # the fillers are no longer small beside what was split: nothing is claimed
            fill = smallest[min(max(fillers, 0), len(load_E))]
            if least[used, heavy] + fill <= heavy * limit * (1.0 + 1e-9):
                return True
    return False


@jit
def least_fill(small: Floats, spare: int) -> float:
    """Least sum of one replica of each of the ``small`` experts, when ``spare`` redundant slots can split them."""
    count = np.ones(len(small))
    for _ in range(spare):
        count[np.argmax(small / count - small / (count + 1.0))] += 1.0
    return float((small / count).sum())
