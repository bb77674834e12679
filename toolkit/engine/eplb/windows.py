"""Windows of the recorder: what one rank counted, what all ranks did, and windows put together. Pure.

Read next: ``history.py``.
L: MoE layers, E: logical experts, P: slots, e: slots of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass
class Window:
    """One window as a rank counted it; ``counts`` and ``received`` may still be filled by the device.

    Attributes:
        counts: [L, E], logical experts; None: only rows received were counted.
        received: [L, e], rows that this rank's slots got; None: another rank counts them.
        begin, end: Unix seconds.
        passes: forward passes.
        phy2log_LP: the placement.
    """

    counts: Tensor | None
    received: Tensor | None
    begin: float
    end: float
    passes: int
    phy2log_LP: Ints


@dataclass(frozen=True)
class Summed:
    """A window of all ranks: assignments of each logical expert [L, E], rows of each slot [L, P]."""

    counts_LE: Ints
    slots_LP: Ints
    begin: float
    end: float
    passes: int


def halved(windows: list[Summed], apart: set[float]) -> list[Summed]:
    """Neighbours merged two by two, but not one that ends at a moment of ``apart`` with the next."""
    found: list[Summed] = []
    single = False  # whether the last one found is a window of before
    for window in windows:
        if single and found[-1].end not in apart:
            found[-1], single = merged(found[-1], window), False
        else:
            found.append(window)
            single = True
    return found


def merged(a: Summed, b: Summed) -> Summed:
    """One window of two that follow each other."""
    counts, slots = a.counts_LE + b.counts_LE, a.slots_LP + b.slots_LP
    return Summed(counts, slots, a.begin, b.end, a.passes + b.passes)


def balancedness(slots_LP: Ints, ranks: int) -> float:
    """Mean over layers of mean / max over EP ranks of the rows they received (SGLang's definition); NaN: no rows."""
    loads = slots_LP.reshape(len(slots_LP), ranks, -1).sum(-1)
    loads = loads[loads.any(1)]
    return float((loads.mean(1) / loads.max(1)).mean()) if len(loads) else float("nan")
