"""Received rows to their slots, and back: the contiguous layout, for dispatchers whose library leaves it to us.

n: received rows, K: top-k, D: hidden, R: placed rows, e: slots of this rank. On a GPU the work is Triton's
(``toolkit/engine/kernels/rows.py``) and no step waits on the host: the layout has room for the worst routing.
Knows no communication. Read next: ``all_to_all.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.engine.moe.dispatch import Dispatched


@dataclass(frozen=True)
class Placed:
    """Where the rows of each (token, choice) pair lie, kept from dispatch to combine.

    Attributes:
        rows: row of ``Dispatched.x``, -1 where the slot is not of this rank. weights: float32. Both [n, K].
    """

    rows: Tensor
    weights: Tensor

    def weighted_sum(self, y: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``y`` in the layout of ``Dispatched.x`` -> [n, D], each token's weighted sum."""
        if y.is_cuda:
            from toolkit.engine.kernels import rows as kernels

            return kernels.gather_rows(y, self.rows, self.weights, dtype)
        tokens, k = torch.nonzero(self.rows >= 0, as_tuple=True)
        out = torch.zeros(len(self.rows), y.shape[-1])
        parts = y[self.rows[tokens, k]].float() * self.weights[tokens, k, None]
        return out.index_add_(0, tokens, parts).to(dtype)


def place(
    x: Tensor, local: Tensor, weights: Tensor, num_local: int, alignment: int, scales: Tensor | None = None
) -> tuple[Dispatched, Placed]:
    """Received rows x [n, D] with local slots and weights [n, K] -> the contiguous layout.

    Slots outside 0..num_local-1 are not this rank's.

    Args:
        scales: [n, D / 128] where x is FP8; GPU only.
    """
    expected = max(1, local.numel() // max(1, num_local))
    if x.is_cuda:
        from toolkit.engine.kernels import rows as kernels

        room = room_for(len(local), local.shape[1], num_local, alignment)
        out, out_scales, rows, counts, ends = kernels.scatter_rows(x, scales, local, num_local, alignment, room)
    else:
        assert scales is None, "FP8 rows on a CPU"
        rows, counts, starts = expert_major(local, num_local, alignment)
        ends, out_scales = starts + counts, None
        padded = (counts + alignment - 1) // alignment * alignment
        out = x.new_zeros(int(padded.sum()), x.shape[1])
        tokens, k = torch.nonzero(rows >= 0, as_tuple=True)
        out[rows[tokens, k]] = x[tokens]
    dispatched = Dispatched("contiguous", out, out_scales, counts, ends, None, alignment, expected)
    return dispatched, Placed(rows, weights)


def room_for(rows: int, top_k: int, num_local: int, alignment: int) -> int:
    """Rows that the contiguous layout may need: each slot with a row may waste all but one of its last block."""
    used = min(top_k, num_local) * rows
    total = used + min(used, num_local) * (alignment - 1)
    return -(-total // alignment) * alignment


def expert_major(local_nK: Tensor, num_local: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orders (token, choice) pairs by slot, each slot from a multiple of ``alignment``.

    Returns:
        rows [n, K] (-1: not of this rank), counts and starts [num_local], int64.
    """
    tokens, k = torch.nonzero((local_nK >= 0) & (local_nK < num_local), as_tuple=True)
    slots = local_nK[tokens, k]
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots, minlength=num_local)
    padded = (counts + alignment - 1) // alignment * alignment
    starts = padded.cumsum(0) - padded
    shift = starts - (counts.cumsum(0) - counts)
    rows = torch.full_like(local_nK, -1)
    rows[tokens[order], k[order]] = torch.arange(len(order)) + shift[slots[order]]
    return rows, counts, starts
