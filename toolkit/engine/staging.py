"""Staging: what the host tells the device before a step, in one copy that nobody waits for.

Small int32 arrays are laid side by side in pinned memory and copied at once; torch's pinned allocator does not hand the
memory out again before the copy has run. ``StaticInts`` is the same into tensors that keep their address, for CUDA
graphs. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]


def ints(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int32)


def to_device(arrays: Sequence[Ints], device: str) -> list[Tensor]:
    """The arrays as int32 tensors on ``device``, in their shapes."""
    flat = _pinned(arrays, device)
    moved = flat.to(device, non_blocking=True)
    parts = moved.split([a.size for a in arrays])
    return [part.view(a.shape) for part, a in zip(parts, arrays)]


def _pinned(arrays: Sequence[Ints], device: str) -> Tensor:
    flat = torch.empty(sum(a.size for a in arrays), dtype=torch.int32, pin_memory=device != "cpu")
    np.concatenate([a.ravel() for a in arrays], out=flat.numpy())
    return flat


class StaticInts:
    """Int32 tensors of fixed shapes at fixed addresses, filled together.

    Attributes:
        views: the tensors, in the order of ``shapes``.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str) -> None:
        sizes = [int(np.prod(shape)) for shape in shapes]
        self._device, self._shapes = device, list(shapes)
        self._flat = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.views = [part.view(shape) for part, shape in zip(self._flat.split(sizes), shapes)]

    def fill(self, arrays: Sequence[Ints]) -> None:
        """Copies the arrays, of exactly these shapes, into the tensors."""
        found = [a.shape for a in arrays]
        assert found == self._shapes, f"{found} given for {self._shapes}"
        self._flat.copy_(_pinned(arrays, self._device), non_blocking=True)
