"""Kernels on a GPU's streams -> whose time it was: every instant of a stream belongs to one kernel at most.

A kernel that is chained to the one before it (programmatic dependent launch) begins while that one still runs, and
waits. Durations count that wait twice, so shares made of them sum to more than the step. Here a kernel's time is what
it adds: its end minus the later of its own begin and the latest end before it on its stream. Streams are taken one by
one; where several ran at once, each kernel's time is whole, and ``beside_us`` says how much of it that was.
Pure: knows no torch and no profiler. Read next: ``rank.py``, which profiles; ``report.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NOTHING = "nothing runs"


class Kernel(msgspec.Struct, frozen=True):
    """One kind of kernel in the profiled decode steps; microseconds and calls are those of a step.

    Attributes:
        us: what its calls add to their streams; of ``NOTHING`` the time in which no stream runs anything.
        calls: of ``NOTHING``, the gaps.
        duration_us: from begin to end of its calls, waiting for the kernel before included.
        beside_us: the part of ``us`` in which kernels of other streams ran too.
    """

    name: str
    us: float
    calls: float
    duration_us: float
    beside_us: float = 0.0


class Attribution(msgspec.Struct, frozen=True):
    """Every kind of kernel, the longest first, ``NOTHING`` among them.

    Attributes:
        span_us: a step, from the first begin to the last end of all steps. What the kernels sum to on one stream; on
            several they sum to more, by what ran side by side.
    """

    kernels: list[Kernel]
    span_us: float

    @property
    def busy_us(self) -> float:
        """Of the span, the time in which any kernel runs."""
        return self.span_us - sum(kernel.us for kernel in self.kernels if kernel.name == NOTHING)


def attributed(
    names: Sequence[str], streams: Sequence[int], begins_us: Floats, ends_us: Floats, steps: int
) -> Attribution:
    """Whose time the span of these calls was.

    Args:
        names, streams, begins_us, ends_us: of each call, in any order.
        steps: that the calls belong to; figures are divided by it.
    """
    if not len(names):
        return Attribution([], 0.0)
    stream_of = np.asarray(streams)
    froms = own_begins(stream_of, begins_us, ends_us)
    own = ends_us - froms
    edges, running = _running(froms, ends_us)
    beside = _between(edges, np.diff(edges) * (running > 1), froms, ends_us)
    kinds, kind_of = np.unique(np.asarray(names), return_inverse=True)

    def of_kind(values: Floats) -> Floats:
        return np.bincount(kind_of, weights=values) / steps

    columns = (of_kind(own), of_kind(np.ones(len(own))), of_kind(ends_us - begins_us), of_kind(beside))
    kernels = [Kernel(str(name), *map(float, row)) for name, *row in zip(kinds, *columns)]
    idle = np.diff(edges) * (running == 0)
    if idle.any():
        gap, count = float(idle.sum()) / steps, int(np.count_nonzero(idle))
        kernels.append(Kernel(NOTHING, gap, count / steps, gap))
    return Attribution(sorted(kernels, key=lambda kernel: -kernel.us), float(edges[-1] - edges[0]) / steps)


def own_begins(streams: NDArray[np.int64], begins_us: Floats, ends_us: Floats) -> Floats:
    """From when each call adds to its stream: the later of its begin and the latest end before it there.

    Its own end for a call that ends while an earlier one still runs: it adds nothing.
    """
    froms = np.array(begins_us, np.float64)
    for stream in np.unique(streams):
        mine = np.flatnonzero(streams == stream)
        mine = mine[np.lexsort((ends_us[mine], begins_us[mine]))]
        before = np.maximum.accumulate(ends_us[mine])[:-1]
        froms[mine[1:]] = np.minimum(np.maximum(begins_us[mine[1:]], before), ends_us[mine[1:]])
    return froms


def _running(froms: Floats, ends: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Moments at which something changes, and how many streams run something from each to the next."""
    edges, place = np.unique(np.concatenate([froms, ends]), return_inverse=True)
    count = len(edges)
    change = np.bincount(place[: len(froms)], minlength=count) - np.bincount(place[len(froms) :], minlength=count)
    return edges, np.cumsum(change)[:-1]


def _between(edges: Floats, measure: Floats, froms: Floats, ends: Floats) -> Floats:
    """The part of ``measure``, which is of the stretches between ``edges``, that lies in each [from, end]."""
    until: Floats = np.concatenate([[0.0], np.cumsum(measure)])
    part: Floats = until[np.searchsorted(edges, ends)] - until[np.searchsorted(edges, froms)]
    return part
