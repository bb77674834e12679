"""Dispatch and combine by all-to-all: a token travels once to each rank that holds one of its experts.

The reference of what DeepEP does, with its two ways. Steps with many rows exchange counts first, so that only real
rows move (DeepEP's normal mode). Steps with few rows, as in decode, send every row to every rank: sizes are then known
from what the ranks agreed on, which saves a collective (low latency mode). Each destination weights and sums the
results of its own experts before they travel back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.moe.dispatch import DISPATCHERS, Dispatched, ExpertShape, StepRows, pack_rows, unpack_rows
from toolkit.engine.moe.place import Placed, place
from toolkit.engine.parallel import Comm

FEW_ROWS = 16  # largest slice for which a collective costs more than the rows sent in vain
FEW_ROWS_GPU = 256  # over NVLink rows are cheap, and waiting for counts on the host is not


@dataclass
class _Handle:
    num_rows: int  # S
    sent: Tensor  # own row of each row sent, destination-major
    send: list[int]  # rows to each rank
    recv: list[int]  # rows from each rank
    received: Tensor
    work: dist.Work | None
    dtype: torch.dtype
    hidden: int
    top_k: int
    alignment: int
    placed: Placed | None = None


@DISPATCHERS.register("all_to_all")
class AllToAllDispatcher:
    masked = False

    def __init__(self, comm: Comm, shape: ExpertShape, engine: EngineConfig) -> None:
        assert comm.size == shape.ep_size, f"all_to_all needs whole experts: {comm.size} ranks, {shape}"
        self.comm, self.shape = comm, shape
        self.num_local = shape.num_local

    def capturable(self, step: StepRows) -> bool:
        return max(step.rows) <= FEW_ROWS_GPU

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> _Handle:
        rows, device = len(x_SD), x_SD.device
        ranks = torch.arange(self.comm.size, device=device)
        owner_SK = torch.where(slot_ids_SK >= 0, slot_ids_SK // self.num_local, -1)
        send, recv = [rows] * self.comm.size, list(step.rows)
        if self._few(step, device):
            dest, sent = ranks.repeat_interleave(rows), torch.arange(rows, device=device).repeat(self.comm.size)
        else:
            wanted_RS = (owner_SK[None] == ranks[:, None, None]).any(-1)
            dest, sent = torch.nonzero(wanted_RS, as_tuple=True)
            send, recv = self._exchange_counts(dest)
        local = torch.where(owner_SK[sent] == dest[:, None], slot_ids_SK[sent] % self.num_local, -1)
        received, work = self.comm.all_to_all(pack_rows(x_SD[sent], local, weights_SK[sent]), send, recv)
        hidden, top_k = x_SD.shape[1], slot_ids_SK.shape[1]
        return _Handle(rows, sent, send, recv, received, work, x_SD.dtype, hidden, top_k, self.shape.align(step))

    @staticmethod
    def _few(step: StepRows, device: torch.device) -> bool:
        return max(step.rows) <= (FEW_ROWS_GPU if device.type == "cuda" else FEW_ROWS)

    def _exchange_counts(self, dest: Tensor) -> tuple[list[int], list[int]]:
        """Rows this rank sends to and gets from each rank."""
        counts = torch.bincount(dest, minlength=self.comm.size)
        one_each = [1] * self.comm.size
        received, work = self.comm.all_to_all(counts, one_each, one_each)
        if work is not None:
            work.wait()
        return counts.tolist(), received.tolist()

    def dispatch_finish(self, handle: _Handle) -> tuple[Dispatched, _Handle]:
        h = handle
        if h.work is not None:
            h.work.wait()
        x, local, weights = unpack_rows(h.received, h.dtype, h.hidden, h.top_k)
        rows, h.placed = place(x, local, weights, self.num_local, h.alignment)
        return rows, h

    def combine_start(self, y: Tensor, handle: _Handle) -> tuple[Tensor, _Handle]:
        h = handle
        assert h.placed is not None, "combine before dispatch_finish"
        back, h.work = self.comm.all_to_all(h.placed.weighted_sum(y, h.dtype), h.recv, h.send)
        return back, h

    def combine_finish(self, handle: tuple[Tensor, _Handle]) -> Tensor:
        back, h = handle
        if h.work is not None:
            h.work.wait()
        out = torch.zeros(h.num_rows, h.hidden, device=back.device)
        return out.index_add_(0, h.sent, back.float()).to(h.dtype)
