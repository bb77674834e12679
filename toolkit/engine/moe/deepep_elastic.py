"""DeepEP's V2 buffer: one call a direction for both ways, rows delivered slot by slot as grouped GEMMs read them.

Rows arrive multiplied out: one for each (token, slot) pair, slots beginning at multiples of the GEMM's tile. The sum
on the way back has no weights, so the experts scale their results (``Dispatched.weights``). Only two-batch overlap has
calls run beside compute: changing streams costs more than a shared expert hides (docs/performance.md).
Knows neither when a step takes which way (``deepep.py``) nor GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.moe.deepep import Settings, Way, expected_rows
from toolkit.engine.moe.dispatch import Dispatched, StepRows
from toolkit.engine.parallel import Comm

TIMEOUT_S = 600  # a rank may wait for a peer that compiles; a stall in serving is the watchdog's to find


@dataclass
class _Handle:
    sent: tuple[Any, ...]  # kept until the communication stream is done with it
    received: Any
    weights: Tensor
    library: Any  # EPHandle
    event: Any
    alignment: int
    expected: int


class ElasticTransport:
    masked = False

    def __init__(self, library: Any, comm: Comm, settings: Settings, ways: tuple[Way, ...]) -> None:
        self.settings, shape = settings, settings.shape
        self.buffer = library.ElasticBuffer(
            comm.group,
            num_max_tokens_per_rank=max(settings.most[way] for way in ways),
            hidden=shape.hidden,
            num_topk=shape.top_k,
            use_fp8_dispatch=False,  # room for bf16, which the way back needs in any case
            allow_hybrid_mode=settings.rdma,
            prefer_overlap_with_compute=settings.overlap,
            num_gpu_timeout_secs=TIMEOUT_S,
        )
        self.num_bytes: int = self.buffer.num_bytes
        self.id_type = library.topk_idx_t

    def library_calls(
        self, way: Way, x: Tensor, slots: Tensor, weights: Tensor, step: StepRows
    ) -> Callable[[], object]:
        from toolkit.engine.kernels import rows as kernels

        s, ids = self.settings, slots.to(self.id_type)
        sent: Any = kernels.quantize(x, by_column=False) if s.fp8 else x
        y: dict[int, Tensor] = {}

        def round_trip() -> None:
            received, _, _, handle, _ = self.buffer.dispatch(
                sent, topk_idx=ids, topk_weights=weights, num_experts=s.shape.num_slots,
                num_max_tokens_per_rank=s.most[way], expert_alignment=s.shape.align(step), do_handle_copy=False,
                do_cpu_sync=way == "normal", do_expand=True, use_tma_aligned_col_major_sf=s.fp8,
            )  # fmt: skip
            got = received[0] if s.fp8 else received
            if len(got) not in y:
                y[len(got)] = torch.zeros(got.shape, dtype=torch.bfloat16, device=x.device)
            self.buffer.combine(y[len(got)], handle)

        return round_trip

    def dispatch_start(self, way: Way, x: Tensor, slots: Tensor, weights: Tensor, step: StepRows) -> _Handle:
        s, shape = self.settings, self.settings.shape
        sent: Any = x.contiguous()
        if s.fp8:
            from toolkit.engine.kernels import rows as kernels

            sent = kernels.quantize(sent, by_column=False)
        ids = slots.to(self.id_type)
        alignment = shape.align(step)
        received, _, row_weights, handle, event = self.buffer.dispatch(
            sent,
            topk_idx=ids,
            topk_weights=weights,
            num_experts=shape.num_slots,
            num_max_tokens_per_rank=s.most[way],
            expert_alignment=alignment,
            do_handle_copy=False,  # nobody writes to the ids before the way back
            do_cpu_sync=way == "normal",
            do_expand=True,
            use_tma_aligned_col_major_sf=s.fp8,
            async_with_compute_stream=s.overlap,
        )
        expected = expected_rows(step, shape)
        return _Handle((sent, ids, weights), received, row_weights, handle, event, alignment, expected)

    def dispatch_finish(self, handle: _Handle) -> tuple[Dispatched, _Handle]:
        h = handle
        if self.settings.overlap:
            h.event.current_stream_wait()
        x, scales = h.received if isinstance(h.received, tuple) else (h.received, None)
        counts, ends = h.library.num_unaligned_recv_tokens_per_expert, h.library.psum_num_recv_tokens_per_expert
        return Dispatched("contiguous", x, scales, counts, ends, h.weights, h.alignment, h.expected), h

    def combine_start(self, y: Tensor, handle: _Handle) -> tuple[Any, ...]:
        overlap = self.settings.overlap
        combined, _, event = self.buffer.combine(y, handle.library, async_with_compute_stream=overlap)
        return combined, event, y, handle

    def combine_finish(self, handle: tuple[Any, ...]) -> Tensor:
        combined, event = handle[:2]
        if self.settings.overlap:
            event.current_stream_wait()
        result: Tensor = combined
        return result
