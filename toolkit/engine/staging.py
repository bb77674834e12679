"""Staging: what the host tells the device before a step, in one copy that nobody waits for.

Small int32 arrays are laid side by side in pinned memory and copied at once; torch's pinned allocator does not hand the
memory out again before the copy has run. Each begins at a multiple of 16 bytes: for pointers that do not, Triton would
compile kernels anew, while requests wait. ``StaticInts`` is the same into tensors that keep their address, for CUDA
graphs. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]
ALIGNED = 4  # numbers that take 16 bytes


def ints(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int32)


def to_device(arrays: Sequence[Ints], device: str) -> list[Tensor]:
    """The arrays as int32 tensors on ``device``, in their shapes."""
    moved = _pinned(arrays, device).to(device, non_blocking=True)
    return _views(moved, [a.shape for a in arrays])


def _pinned(arrays: Sequence[Ints], device: str) -> Tensor:
    flat = torch.empty(sum(_room(a.size) for a in arrays), dtype=torch.int32, pin_memory=device != "cpu")
    numbers, first = flat.numpy(), 0
    for a in arrays:
        numbers[first : first + a.size] = a.ravel()
        first += _room(a.size)
    return flat


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    parts = flat.split([_room(size) for size in sizes])
    return [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes)]


class StaticInts:
    """Int32 tensors of fixed shapes at fixed addresses, filled together.

    Attributes:
        views: the tensors, in the order of ``shapes``.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str) -> None:
        self._device, self._shapes = device, list(shapes)
        self._flat = torch.zeros(sum(_room(math.prod(shape)) for shape in shapes), dtype=torch.int32, device=device)
        self.views = _views(self._flat, shapes)

    def fill(self, arrays: Sequence[Ints]) -> None:
        """Copies the arrays, of exactly these shapes, into the tensors."""
        found = [a.shape for a in arrays]
        assert found == self._shapes, f"{found} given for {self._shapes}"
        self._flat.copy_(_pinned(arrays, self._device), non_blocking=True)
