"""Dispatch by all-gather, combine by reduce-scatter (SGLang's moe_a2a_backend "none").

Every rank sees every token, keeps what its slots need, and the partial sums meet in the reduction. Also the way for
experts split over several ranks (moe_tp > 1): their partial results are summed by the same reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.moe.dispatch import DISPATCHERS, Dispatched, ExpertShape, StepRows, pack_rows, unpack_rows
from toolkit.engine.moe.place import Placed, place
from toolkit.engine.parallel import Comm, gather_rows, reduce_rows


@dataclass
class _Handle:
    step: StepRows
    gathered: Tensor | None  # packed rows of all ranks; with one rank:
    own: tuple[Tensor, Tensor, Tensor] | None  # its rows, slots and weights as they are
    dtype: torch.dtype
    hidden: int
    top_k: int
    placed: Placed | None = None


@DISPATCHERS.register("allgather")
class AllGatherDispatcher:
    masked = False

    def __init__(self, comm: Comm, shape: ExpertShape, engine: EngineConfig) -> None:
        self.comm, self.shape = comm, shape
        self.num_local = shape.num_local
        self.first_slot = shape.ep_rank * self.num_local

    def capturable(self, step: StepRows) -> bool:
        return True

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> _Handle:
        sizes = x_SD.dtype, x_SD.shape[1], slot_ids_SK.shape[1]
        if self.comm.size == 1:
            return _Handle(step, None, (x_SD, slot_ids_SK, weights_SK), *sizes)
        packed = pack_rows(x_SD, slot_ids_SK, weights_SK)
        gathered = gather_rows(self.comm, packed, step.rows, step.padding, fill=0xFF)  # slot ids of padding are -1
        return _Handle(step, gathered, None, *sizes)

    def dispatch_finish(self, handle: _Handle) -> tuple[Dispatched, _Handle]:
        h = handle
        if h.own is not None:
            x, local, weights = h.own
        else:
            assert h.gathered is not None
            x, slots, weights = unpack_rows(h.gathered, h.dtype, h.hidden, h.top_k)
            local = slots - self.first_slot
        rows, h.placed = place(x, local, weights, self.num_local, self.shape.align(h.step))
        return rows, h

    def combine_start(self, y: Tensor, handle: _Handle) -> tuple[Tensor, _Handle]:
        h = handle
        assert h.placed is not None, "combine before dispatch_finish"
        partial = h.placed.weighted_sum(y, h.dtype if self.comm.size == 1 else torch.float32)
        return reduce_rows(self.comm, partial, h.step.rows, h.step.padding), h

    def combine_finish(self, handle: tuple[Tensor, _Handle]) -> Tensor:
        summed, h = handle
        return summed.to(h.dtype)
