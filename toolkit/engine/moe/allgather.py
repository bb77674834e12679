"""Dispatch by all-gather, combine by reduce-scatter (SGLang's moe_a2a_backend "none").

Every rank sees every token, keeps what its slots need, and the partial sums meet in the reduction. Also the way for
experts split over several ranks (moe_tp > 1): their partial results are summed by the same reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.engine.moe.dispatch import DISPATCHERS, Dispatched, StepRows, expert_major, pack_rows, unpack_rows
from toolkit.engine.parallel import Comm, gather_rows, reduce_rows


@dataclass
class _Handle:
    step: StepRows
    gathered: Tensor  # packed rows of all ranks
    dtype: torch.dtype
    hidden: int
    top_k: int
    rows: Tensor | None = None  # of y, in pair order
    tokens: Tensor | None = None  # gathered row of each pair
    weights: Tensor | None = None


@DISPATCHERS.register("allgather")
class AllGatherDispatcher:
    def __init__(self, comm: Comm, num_slots: int, alignment: int, ep_rank: int, ep_size: int) -> None:
        self.comm, self.alignment = comm, alignment
        self.num_local = num_slots // ep_size
        self.first_slot = ep_rank * self.num_local

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> _Handle:
        packed = pack_rows(x_SD, slot_ids_SK, weights_SK)
        gathered = gather_rows(self.comm, packed, step.rows, step.padding, fill=0xFF)  # slot ids of padding are -1
        return _Handle(step, gathered, x_SD.dtype, x_SD.shape[1], slot_ids_SK.shape[1])

    def dispatch_finish(self, handle: _Handle) -> tuple[Dispatched, _Handle]:
        h = handle
        x, slots, weights = unpack_rows(h.gathered, h.dtype, h.hidden, h.top_k)
        local = slots - self.first_slot
        tokens, k = torch.nonzero((local >= 0) & (local < self.num_local), as_tuple=True)
        order, h.rows, counts, starts, total = expert_major(local[tokens, k], self.num_local, self.alignment)
        h.tokens, h.weights = tokens[order], weights[tokens, k][order]
        out = x.new_zeros(total, h.hidden)
        out[h.rows] = x[h.tokens]
        return Dispatched("contiguous", out, None, counts.cpu(), starts.cpu()), h

    def combine_start(self, y: Tensor, handle: _Handle) -> tuple[Tensor, _Handle]:
        h = handle
        assert h.rows is not None and h.tokens is not None and h.weights is not None, "combine before dispatch_finish"
        partial = torch.zeros(len(h.gathered), h.hidden, device=y.device)
        partial.index_add_(0, h.tokens, y[h.rows].float() * h.weights[:, None])
        return reduce_rows(self.comm, partial, h.step.rows, h.step.padding), h

    def combine_finish(self, handle: tuple[Tensor, _Handle]) -> Tensor:
        summed, h = handle
        return summed.to(h.dtype)
