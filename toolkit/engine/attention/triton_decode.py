"""Decode by the project's own kernel where requests fill the GPU; FlashAttention 3 for all else.

FlashAttention's decode has one or two programs on a multiprocessor, which all begin and end together; while they do,
nothing is read. Read next: ``toolkit/engine/kernels/decode_attention.py``.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.engine.attention import fa3
from toolkit.engine.attention.backend import BACKENDS, KindPlan
from toolkit.engine.attention.paged import PagedSegment
from toolkit.engine.kv.pool import KVCache

if TYPE_CHECKING:
    from toolkit.engine.kernels.decode_attention import Shape

PAGE, DIMS = 64, (64, 128, 256)  # a page must be a multiple; values a head
WHOLE = 4096  # tokens: where no more can be seen, one program reads a request
SPAN, PARTS = 2048, 16  # elsewhere: tokens that a program reads; more, if a request could have more parts than that


def fits(cache: KVCache) -> bool:
    spec = cache.spec
    return (
        spec.k_dim == spec.v_dim
        and spec.k_dim in DIMS
        and not cache.page_size % PAGE
        and cache.dtype in (torch.bfloat16, torch.float16)
        and not cache.fp8
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.is_available()
        and fa3.fits(cache)
    )


@BACKENDS.register("triton")
class TritonAttention(fa3.Fa3Attention):
    shape: Shape | None = None  # of programs; None: by how many there are
    least = 0.9  # programs for each multiprocessor: with fewer, FlashAttention cuts requests into parts

    def __init__(self, cache: KVCache, device: str) -> None:
        if not fits(cache):
            raise ValueError(
                "engine.attention_backend=triton needs Hopper, sglang-kernel, a page_size that is a multiple of "
                f"{PAGE} and keys and values of {', '.join(map(str, DIMS))} values a head in 16 bits, not "
                f"page_size={cache.page_size} with {cache.spec}: use page_size={PAGE}, or attention_backend=auto"
            )
        super().__init__(cache, device)
        self._longest = 0  # tokens that a request may have, as far as known
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        from toolkit.engine.kernels.decode_attention import HEADS, IN_PARTS, decode, shape_for

        requests, heads = len(segment.q_lens), self.cache.spec.heads
        few = requests * heads < self.least * self._processors
        if few or segment.max_q > 1 or q.shape[1] > HEADS * heads:
            return super()._paged(q, layer, kind, segment, scale)
        if segment.first not in kind.scratch:
            kind.scratch[segment.first] = torch.zeros(requests, heads, dtype=torch.int32, device=q.device)
        page = self.cache.page_size
        longest = max(self._longest, segment.tables_nP.shape[1] * page)
        if kind.window:
            longest = min(longest, kind.window + page)
        span, shape = WHOLE, shape_for(requests * heads, self._processors)
        if longest > WHOLE:
            span, shape = max(SPAN, -(-longest // (PARTS * page)) * page), IN_PARTS
        return decode(
            q.contiguous(), self.cache.k[layer], self.cache.v[layer], segment.tables_nP, segment.lens_n, page, scale,
            kind.window, self.shape or shape, kind.scratch[segment.first], longest, span,
        )  # fmt: skip

    def static_shapes(self, size: int, max_len: int) -> list[tuple[int, ...]]:
        self._longest = max(self._longest, max_len)  # so that steps without a graph run the same kernels
        return super().static_shapes(size, max_len)
