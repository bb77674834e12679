"""DeepEP's first buffer: a pair of calls for each way, with the shapes that its compiled kernels know.

``normal`` delivers each row once a rank; ``place.py`` lays the rows out by slot. ``low_latency`` delivers them by
slot, [e, M, D], M whole tiles of the GEMM, and weights the results itself. It needs NVSHMEM, which finds peers of the
same host by NVLink.
Knows neither when a step takes which way (``deepep.py``) nor GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.experts_check import whole_tiles
from toolkit.engine.gpu_libraries import scales_are_powers_of_two
from toolkit.engine.moe.deepep import Settings, Way, expected_rows
from toolkit.engine.moe.dispatch import Dispatched, StepRows
from toolkit.engine.moe.place import Placed, place
from toolkit.engine.parallel import Comm


@dataclass
class _Handle:
    way: Way
    sent: tuple[Any, ...]  # kept until the communication stream is done with it
    received: Any
    library: Any
    event: Any
    hook: Any
    counts: Tensor | None  # low latency: rows of each slot
    ids: Tensor  # normal: local slots of the received rows; low latency: slots of the sent ones
    weights: Tensor  # of the same rows
    alignment: int
    expected: int
    placed: Placed | None = None


class LegacyTransport:
    masked = True

    def __init__(self, library: Any, comm: Comm, settings: Settings, ways: tuple[Way, ...]) -> None:
        self.settings, shape = settings, settings.shape
        buffer, size = library.Buffer, comm.size
        nvlink_bytes = rdma_bytes = 0
        if "normal" in ways:
            for config in (buffer.get_dispatch_config(size), buffer.get_combine_config(size)):
                nvlink_bytes = max(nvlink_bytes, config.get_nvl_buffer_size_hint(shape.hidden * 2, size))
                rdma_bytes = max(rdma_bytes, config.get_rdma_buffer_size_hint(shape.hidden * 2, size))
        low_latency = "low_latency" in ways
        self.room = whole_tiles(settings.most["low_latency"], size, shape.alignment)
        if low_latency:
            hint = buffer.get_low_latency_rdma_size_hint(self.room, shape.hidden, size, shape.num_slots)
            rdma_bytes = max(rdma_bytes, hint)
        queues = shape.num_local if low_latency else 24
        self.buffer = buffer(
            comm.group, nvlink_bytes, rdma_bytes, low_latency_mode=low_latency, num_qps_per_rank=queues
        )
        self.num_bytes = nvlink_bytes + rdma_bytes
        self.clean = len(ways) == 2 and self.buffer.runtime.get_num_rdma_ranks() > 1
        self.id_type = library.topk_idx_t

    def library_calls(
        self, way: Way, x: Tensor, slots: Tensor, weights: Tensor, step: StepRows
    ) -> Callable[[], object]:
        from toolkit.engine.kernels import rows as kernels

        buffer, shape, fp8 = self.buffer, self.settings.shape, self.settings.fp8
        ids, most = slots.to(self.id_type), self.room
        sent: Any = kernels.quantize(x, by_column=False) if fp8 else x
        y: dict[tuple[int, ...], Tensor] = {}

        def like(received: Any) -> Tensor:
            got = received[0] if fp8 else received
            if got.shape not in y:
                y[got.shape] = torch.zeros(got.shape, dtype=torch.bfloat16, device=x.device)
            return y[got.shape]

        def low_latency() -> None:
            received, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, most, shape.num_slots, use_fp8=fp8)
            buffer.low_latency_combine(like(received), ids, weights, handle)

        def normal() -> None:
            by_rank, by_rdma, by_slot, is_in_rank, _ = buffer.get_dispatch_layout(ids, shape.num_slots)
            received, _, _, _, handle, _ = buffer.dispatch(
                sent, num_tokens_per_rank=by_rank, num_tokens_per_rdma_rank=by_rdma, num_tokens_per_expert=by_slot,
                is_token_in_rank=is_in_rank, topk_idx=ids, topk_weights=weights,
            )  # fmt: skip
            buffer.combine(like(received), handle)

        return low_latency if way == "low_latency" else normal

    def dispatch_start(self, way: Way, x: Tensor, slots: Tensor, weights: Tensor, step: StepRows) -> _Handle:
        ids, expected = slots.to(self.id_type), expected_rows(step, self.settings.shape)
        alignment = self.settings.shape.align(step)
        if way == "low_latency":
            return self._start_low_latency(x.contiguous(), ids, weights, alignment, expected)
        return self._start_normal(x.contiguous(), ids, weights, alignment, expected)

    def _start_normal(self, x: Tensor, ids: Tensor, weights: Tensor, alignment: int, expected: int) -> _Handle:
        slots = self.settings.shape.num_slots
        sent: Any = x
        if self.settings.fp8:
            from toolkit.engine.kernels import rows as kernels

            sent = kernels.quantize(x, by_column=False)
        by_rank, by_rdma_rank, by_slot, is_in_rank, _ = self.buffer.get_dispatch_layout(ids, slots)
        received, local, row_weights, _, handle, event = self.buffer.dispatch(
            sent,
            num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_rdma_rank,
            num_tokens_per_expert=by_slot,
            is_token_in_rank=is_in_rank,
            topk_idx=ids,
            topk_weights=weights,
            async_finish=self.settings.overlap,
        )
        kept = sent, ids, weights, by_rank, by_slot, is_in_rank
        return _Handle("normal", kept, received, handle, event, None, None, local, row_weights, alignment, expected)

    def _start_low_latency(self, x: Tensor, ids: Tensor, weights: Tensor, alignment: int, expected: int) -> _Handle:
        shape, overlap = self.settings.shape, self.settings.overlap
        received, counts, handle, event, hook = self.buffer.low_latency_dispatch(
            x, ids, self.room, shape.num_slots, use_fp8=self.settings.fp8, round_scale=scales_are_powers_of_two(),
            return_recv_hook=overlap,
        )  # fmt: skip
        hook = hook if overlap else None
        return _Handle("low_latency", (x,), received, handle, event, hook, counts, ids, weights, alignment, expected)

    def dispatch_finish(self, handle: _Handle) -> tuple[Dispatched, _Handle]:
        h = handle
        if h.way == "normal":
            if self.settings.overlap:
                h.event.current_stream_wait()
            x, scales = h.received if isinstance(h.received, tuple) else (h.received, None)
            rows, h.placed = place(x, h.ids, h.weights, self.settings.shape.num_local, h.alignment, scales)
            return rows, h
        if h.hook is not None:
            h.hook()
        assert h.counts is not None
        x, scales = h.received if isinstance(h.received, tuple) else (h.received, None)
        return Dispatched("masked", x, scales, h.counts, h.counts, None, h.alignment, h.expected), h

    def combine_start(self, y: Tensor, handle: _Handle) -> tuple[Any, ...]:
        h = handle
        if h.way == "low_latency":
            overlap = self.settings.overlap
            combined, event, hook = self.buffer.low_latency_combine(
                y, h.ids, h.weights, h.library, return_recv_hook=overlap
            )
            return combined, None, hook if overlap else None, y, h
        assert h.placed is not None, "combine before dispatch_finish"
        partial = h.placed.weighted_sum(y, y.dtype)
        combined, _, event = self.buffer.combine(partial, h.library, async_finish=self.settings.overlap)
        return combined, event, None, partial, h

    def combine_finish(self, handle: tuple[Any, ...]) -> Tensor:
        combined, event, hook = handle[:3]
        if event is not None and self.settings.overlap:
            event.current_stream_wait()
        if hook is not None:
            hook()
        if self.clean and event is not None:  # between hosts the ways share a buffer, which low latency wants zeroed
            shape = self.settings.shape
            self.buffer.clean_low_latency_buffer(self.room, shape.hidden, shape.num_slots)
        result: Tensor = combined
        return result
