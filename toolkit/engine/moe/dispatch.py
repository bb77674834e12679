"""The dispatcher seam: tokens to the ranks that hold their experts, and results back.

S: rows of this rank's slice, D: hidden, K: top-k, R: received rows, e: slots of this rank, M: rows a slot at most.
Dispatchers speak physical slots; which expert a slot holds is ``eplb/placement.py``'s business.
The halves (start, finish) are where two-batch overlap interleaves. Read next: ``all_to_all.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from toolkit.engine.parallel import Comm, PaddingMode
from toolkit.registry import Registry


@dataclass(frozen=True)
class StepRows:
    """What all ranks of the group know of a step before its dispatches.

    Attributes:
        rows: rows of each rank's slice, [ranks].
        is_extend: True when any rank prefills.
        padding: how rows are laid side by side where they are gathered.
    """

    rows: tuple[int, ...]
    is_extend: bool
    padding: PaddingMode = "max_len"


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts.

    Attributes:
        x: contiguous: [R, D], slot-major; slot s owns ``counts[s]`` rows from ``starts[s]`` (rows between are padding).
            masked: [e, M, D]; slot s owns the first ``counts[s]`` rows of x[s].
        scales: quantisation scales of ``x``, or None.
        counts: real rows of each slot, int64 [e], on the host.
        starts: first row of each slot, int64 [e], on the host; zeros in the masked layout.
    """

    layout: Literal["contiguous", "masked"]
    x: Tensor
    scales: Tensor | None
    counts: Tensor
    starts: Tensor


class TokenDispatcher(Protocol):
    """One instance carries one batch at a time through its four calls; the handles are its own."""

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> Any:
        """Sends each row to the ranks of its slots. Slot -1 goes nowhere. Every rank must call, rows or not."""
        ...

    def dispatch_finish(self, handle: Any) -> tuple[Dispatched, Any]:
        """Waits for the rows; also returns the handle that ``combine_start`` needs."""
        ...

    def combine_start(self, y: Tensor, handle: Any) -> Any:
        """``y`` in the layout of ``Dispatched.x``: sends each row, times its weight, back to its token."""
        ...

    def combine_finish(self, handle: Any) -> Tensor:
        """[S, D]: each token's weighted sum over its experts; zeros where it had none."""
        ...


class DispatcherFactory(Protocol):
    def __call__(self, comm: Comm, num_slots: int, alignment: int, ep_rank: int, ep_size: int) -> TokenDispatcher: ...


DISPATCHERS: Registry[DispatcherFactory] = Registry("engine.moe_a2a_backend")


def make_dispatcher(
    name: str, comm: Comm, num_slots: int, alignment: int, ep_rank: int, ep_size: int
) -> TokenDispatcher:
    """The dispatcher called ``name``.

    Args:
        comm: the ranks that hold one whole set of experts.
        num_slots: physical experts of the layer; slot s is on EP rank s // (num_slots / ep_size).
        alignment: rows at which each slot starts in the contiguous layout.
    """
    from toolkit.engine.moe import all_to_all, allgather  # noqa: F401  (register themselves)

    return DISPATCHERS[name](comm, num_slots, alignment, ep_rank, ep_size)


def expert_major(slots_N: Tensor, num_local: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Orders N (token, slot) pairs by slot.

    Args:
        slots_N: local slot of each pair, 0..num_local-1.

    Returns:
        order [N]: the pairs in slot order. rows [N]: the row of each ordered pair, counts and starts [num_local],
        and the number of rows R with every slot's start aligned.
    """
    order = torch.argsort(slots_N, stable=True)
    counts = torch.bincount(slots_N, minlength=num_local)
    padded = (counts + alignment - 1) // alignment * alignment
    starts = padded.cumsum(0) - padded
    shift = starts - (counts.cumsum(0) - counts)
    rows = torch.arange(len(order), device=order.device) + shift[slots_N[order]]
    return order, rows, counts, starts, int(padded.sum())


@dataclass(frozen=True)
class Placed:
    """Where the rows of each (token, slot) pair lie, kept from dispatch to combine.

    Attributes:
        rows: of ``Dispatched.x``. tokens: received row of the pair. weights: float32. All [pairs], in slot order.
        num_tokens: received rows.
    """

    rows: Tensor
    tokens: Tensor
    weights: Tensor
    num_tokens: int

    def weighted_sum(self, y: Tensor) -> Tensor:
        """``y`` in the layout of ``Dispatched.x`` -> float32 [num_tokens, D], each token's weighted sum."""
        out = torch.zeros(self.num_tokens, y.shape[-1], device=y.device)
        return out.index_add_(0, self.tokens, y[self.rows].float() * self.weights[:, None])


def place(x: Tensor, local: Tensor, weights: Tensor, num_local: int, alignment: int) -> tuple[Dispatched, Placed]:
    """Received rows x [n, D] with local slots and weights [n, K] -> the contiguous layout.

    Slots outside 0..num_local-1 are not this rank's.
    """
    tokens, k = torch.nonzero((local >= 0) & (local < num_local), as_tuple=True)
    order, rows, counts, starts, total = expert_major(local[tokens, k], num_local, alignment)
    tokens, weights = tokens[order], weights[tokens, k][order]
    out = x.new_zeros(total, x.shape[1])
    out[rows] = x[tokens]
    return Dispatched("contiguous", out, None, counts.cpu(), starts.cpu()), Placed(rows, tokens, weights, len(x))


def pack_rows(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One byte row of each token's activation, ids (int32) and weights (float32), so that one collective moves all."""
    parts = (x, ids.to(torch.int32), weights.to(torch.float32))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_rows(rows: Tensor, dtype: torch.dtype, hidden: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack_rows``: x [n, hidden], ids int64 [n, top_k], weights float32 [n, top_k]."""
    x, ids, weights = rows.split([hidden * dtype.itemsize, 4 * top_k, 4 * top_k], dim=1)
    return (
        x.contiguous().view(dtype),
        ids.contiguous().view(torch.int32).long(),
        weights.contiguous().view(torch.float32),
    )
