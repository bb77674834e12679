"""A layer's table of the weighted choice as kernels read it: one row of 32-bit words, of a size that never changes.

CUDA graphs hold the row's address and its sizes, so these depend on the model and the ranks alone, and a new placement
is one copy. Knows where each part of ``weighted.Table`` lies, and no torch. Read next: ``../kernels/replicas.py``.
E: experts, G: GPUs, F: windows, X: places of a window, H: places that a GPU can hold, W: places in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.weighted import WIDTH, Table

Ints = NDArray[np.int64]
Words = NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """Sizes of the parts; all but ``experts`` are powers of two.

    Attributes:
        bins: of a batch's counts: in front one for each GPU, of its experts that have no other replica; then, from
            ``gpus`` on, one for each expert that has.
    """

    experts: int
    gpus: int
    bins: int
    windows: int
    holds: int

    @classmethod
    def of(cls, experts: int, slots: int, ranks: int) -> Layout:
        more, gpus = slots - experts, power_of_two(ranks)  # an expert with n replicas has fewer than n windows
        windows = power_of_two(max(more, 2))
        holds = power_of_two(min(2 * slots // ranks, windows * WIDTH))  # a replica has two places at most
        return cls(experts, gpus, power_of_two(gpus + min(experts, more)), windows, holds)

    @property
    def room(self) -> int:
        """Of experts, as a power of two."""
        return power_of_two(self.experts)

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def words(self) -> int:
        """Of a row; whole 16 bytes. The last one in use is the number of rounds."""
        ints = 3 * self.experts + self.windows * (1 + 2 * WIDTH) + self.gpus * self.holds
        floats = self.windows * (3 + WIDTH) + self.gpus**2
        return -(-(ints + floats + 1) // 4) * 4


def power_of_two(number: int) -> int:
    """The least one that is not less."""
    return 1 << (number - 1).bit_length()


def pack(table: Table, layout: Layout) -> Words:
    """The row: the parts in the order in which they are put together below, unused places -1 or 0."""
    t, several_E = table, table.count_E > 1
    bin_E = np.where(several_E, layout.gpus + several_E.cumsum() - 1, t.gpu_P[t.first_E])
    window_E = np.searchsorted(t.expert_F, np.arange(layout.experts))  # the first one
    at_E = np.where(several_E, WIDTH * window_E, t.slot_P[t.first_E])
    from_W = several_E.repeat(t.count_E).nonzero()[0]
    window_W = np.arange(len(t.size_F)).repeat(t.size_F)
    to_W = WIDTH * window_W + from_W - t.first_F[window_W]
    places, gpu_W = layout.windows * WIDTH, t.gpu_P[from_W]
    by_gpu_W, held_G = np.argsort(gpu_W, kind="stable"), np.bincount(gpu_W, minlength=layout.gpus)
    assert held_G.max() <= layout.holds and len(t.size_F) <= layout.windows, (held_G.max(), len(t.size_F), layout)
    in_turn_W = np.arange(len(to_W)) - (held_G.cumsum() - held_G)[gpu_W[by_gpu_W]]
    before_F = t.part_F.cumsum() - t.part_F
    smooth_GG = np.eye(layout.gpus)
    smooth_GG[: len(t.smooth_GG), : len(t.smooth_GG)] = t.smooth_GG
    ints = (
        bin_E, at_E, t.count_E, _spread(bin_E[t.expert_F], layout.windows, 0),
        _spread(gpu_W, places, -1, to_W), _spread(t.slot_P[from_W], places, -1, to_W),
        _spread(to_W[by_gpu_W], layout.gpus * layout.holds, -1, gpu_W[by_gpu_W] * layout.holds + in_turn_W),
    )  # fmt: skip
    floats = (
        _spread(t.part_F, layout.windows, 0.0), _spread(before_F - before_F[window_E[t.expert_F]], layout.windows, 0.0),
        _spread(1.0 / t.size_F, layout.windows, 0.0), _spread(t.even_P[from_W], places, 0.0, to_W), smooth_GG.ravel(),
    )  # fmt: skip
    row = np.zeros(layout.words, np.int32)
    words = (np.concatenate(ints).astype("i4"), np.concatenate(floats).astype("f4").view("i4"), [t.rounds])
    used = np.concatenate(words)
    row[: len(used)] = used
    return row


def _spread(values: NDArray[np.generic], size: int, unused: float, at: Ints | None = None) -> NDArray[np.generic]:
    """``values`` in front, or at ``at``, of an array of this size."""
    out = np.full(size, unused, values.dtype)
    out[slice(len(values)) if at is None else at] = values
    return out
