"""Decode's dispatch and combine on one host without a library: ranks write into each other's memory over NVLink.

With few rows and many experts nearly every row goes to nearly every rank, so what counts is latency: two kernels each
way (``kernels/nvlink.py``), where DeepEP must also serve many hosts. Steps with prefill, and any with more rows than
there is room for, go by DeepEP where it is installed, else by all-gather.
S: rows of this rank's slice, D: hidden, K: top-k. Knows no GEMM.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.fp8 import BLOCK
from toolkit.engine.late import Late
from toolkit.engine.layers import RMSNorm
from toolkit.engine.moe.dispatch import DISPATCHERS, Dispatched, ExpertShape, StepRows, TokenDispatcher
from toolkit.engine.moe.place import room_for
from toolkit.engine.parallel import Comm

log = logging.getLogger(__name__)

ALIGN = 128  # bytes at which the parts of a buffer begin


@dataclass
class _Round:
    """A round trip under way, of one rank."""

    step_rows: int
    dtype: torch.dtype
    alignment: int
    sent: tuple[Tensor, Tensor | None]
    slots: Tensor
    weights: Tensor
    placed: Tensor | None = None  # where the rows of each (token, choice) pair lie


@dataclass
class _Other:
    """A round trip that the other dispatcher makes."""

    inner: Any


@DISPATCHERS.register("nvlink")
class NvlinkDispatcher:
    def __init__(self, comm: Comm, shape: ExpertShape, engine: EngineConfig) -> None:
        """Raises ``ValueError`` when the ranks cannot reach each other's memory."""
        assert comm.size == shape.ep_size, f"nvlink needs whole experts: {comm.size} ranks, {shape}"
        from toolkit.engine.kernels import nvlink, nvlink_back, rows, signals

        self._kernels, self._back, self._quantize = nvlink, nvlink_back, rows.quantize
        self.shape, self.fp8 = shape, shape.fp8 and engine.deepep_dispatch_dtype != "bf16"
        self.most, self.ranks = shape.max_decode_rows, comm.size
        other = "deepep" if find_spec("deep_ep") is not None and comm.size > 1 else "allgather"
        self.other: TokenDispatcher = DISPATCHERS[other](comm, shape, engine)
        self.masked = self.other.masked
        sizes = self._sizes()
        self._buffer, addresses = _shared_buffer(sum(sizes), comm)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.window = signals.Window(
            torch.tensor(addresses, dtype=torch.int64, device="cuda"),
            torch.tensor([1, 0], dtype=torch.int32, device="cuda"),
            torch.zeros(2 * comm.size, dtype=torch.int32, device="cuda"),
            comm.rank, *([0, *ends[:-1]]),
        )  # fmt: skip
        log.info(
            "NVLink over %d ranks: decode steps of up to %d rows a rank, rows in %s, %.1f MB of buffers; others by %s",
            comm.size, self.most, "fp8" if self.fp8 else "bf16", sum(sizes) / 1e6, other,
        )  # fmt: skip

    def capturable(self, step: StepRows) -> bool:
        return self._mine(step) or self.other.capturable(step)

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> _Round | _Other:
        if not self._mine(step):
            return _Other(self.other.dispatch_start(x_SD, slot_ids_SK, weights_SK, step))
        assert x_SD.dtype == torch.bfloat16, f"nvlink moves bfloat16, not {x_SD.dtype}"
        x = x_SD.contiguous()
        sent: tuple[Tensor, Tensor | None] = self._quantize(x, by_column=False) if self.fp8 else (x, None)
        slots, weights = slot_ids_SK.contiguous(), weights_SK.float().contiguous()
        rows = max(step.rows)
        self._kernels.push(self.window, sent[0], sent[1], slots, weights, rows, self.shape.num_local)
        return _Round(rows, x.dtype, self.shape.align(step), sent, slots, weights)

    def dispatch_finish(self, handle: _Round | _Other) -> tuple[Dispatched, _Round | _Other]:
        h = handle
        if isinstance(h, _Other):
            dispatched, h.inner = self.other.dispatch_finish(h.inner)
            return dispatched, h
        shape, (like, scales) = self.shape, h.sent
        tokens = self.ranks * h.step_rows
        room = room_for(tokens, shape.top_k, shape.num_local, h.alignment)
        groups = 0 if scales is None else scales.shape[1]
        x, placed_scales, h.placed, counts, ends = self._kernels.place(
            self.window, like, groups, shape.top_k, h.step_rows, shape.num_local, h.alignment, room
        )
        expected = max(1, -(-tokens * shape.top_k // shape.num_slots))
        return Dispatched("contiguous", x, placed_scales, counts, ends, None, h.alignment, expected), h

    def combine_start(self, y: Tensor, handle: _Round | _Other) -> _Round | _Other:
        h = handle
        if isinstance(h, _Other):
            h.inner = self.other.combine_start(y, h.inner)
            return h
        assert h.placed is not None, "combine before dispatch_finish"
        self._back.give_back(self.window, y, h.placed, h.step_rows)
        return h

    def combine_finish(self, handle: _Round | _Other) -> Tensor:
        h = handle
        if isinstance(h, _Other):
            return self.other.combine_finish(h.inner)
        return self._total(h, None)

    def is_late(self, handle: _Round | _Other) -> bool:
        return isinstance(handle, _Round)

    def combine_late(self, handle: _Round | _Other, shared: Tensor | None) -> Late:
        h = handle
        assert isinstance(h, _Round), "this round trip is another dispatcher's"

        def into(x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
            out: tuple[Tensor, Tensor] = self._back.total_norm(
                self.window, h.slots, h.step_rows, self.shape.num_local, shared, x, norm
            )
            return out

        return Late(lambda: self._total(h, shared), into)

    def _total(self, h: _Round, more: Tensor | None) -> Tensor:
        out: Tensor = self._back.total(
            self.window, h.slots, self.shape.hidden, h.dtype, h.step_rows, self.shape.num_local, more
        )
        return out

    def _mine(self, step: StepRows) -> bool:
        """Alike on all ranks: from what they agreed on."""
        return not step.is_extend and max(step.rows) <= self.most

    def _sizes(self) -> list[int]:
        """Bytes of rows, scales, slots, weights, results and counters, as ``Window`` orders them."""
        rows, s = self.ranks * self.most, self.shape
        wanted = (
            rows * s.hidden * (1 if self.fp8 else 2),
            rows * s.hidden // BLOCK * 4 if self.fp8 else 0,
            rows * s.top_k * 4,
            rows * s.top_k * 4,
            rows * s.hidden * 2,
            2 * self.ranks * ALIGN,
        )
        return [-(-size // ALIGN) * ALIGN for size in wanted]


def _shared_buffer(size: int, comm: Comm) -> tuple[Tensor, list[int]]:
    """A zeroed buffer that all ranks can write to, and the addresses of all of theirs.

    Raises:
        ValueError: the GPUs are not connected.
    """
    if comm.group is None:
        alone = torch.zeros(size, dtype=torch.uint8, device="cuda")
        return alone, [alone.data_ptr()]
    import torch.distributed._symmetric_memory as symmetric

    try:
        buffer = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        buffer.zero_()
        shared = symmetric.rendezvous(buffer, comm.group)
    except RuntimeError as error:
        raise ValueError(
            "engine.moe_a2a_backend=nvlink needs GPUs of one host that reach each other's memory, which these do not "
            f"({error}): use moe_a2a_backend=deepep"
        ) from error
    torch.cuda.synchronize()
    comm.all_reduce(torch.zeros(1, device="cuda"))  # nobody writes before all have zeroed
    torch.cuda.synchronize()
    return buffer, [int(address) for address in shared.buffer_ptrs]
