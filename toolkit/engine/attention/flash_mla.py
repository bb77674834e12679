"""MLA decode by FlashMLA (package sgl-flash-mla): Hopper, pages of 64 tokens, a latent of 512 + 64 values.

The cache is in bf16 or in FP8 without scales; queries then go to FP8 as well, which is what the library's dense kernel
for that takes. It is not faster (docs/performance.md), but the cache holds twice the tokens.
Its schedule is worked out on the device in the first layer of a step, for all. Prefill expands keys and values and
runs FlashAttention 3.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.attention.backend import BACKENDS, AttentionPlan, KindPlan, Segment
from toolkit.engine.attention.paged import PagedAttention, PagedSegment, ragged_by_fa3
from toolkit.engine.kv.pool import KVCache, to_fp8

PAGE, LATENT, HEADS = 64, 512, 64


def fits(cache: KVCache) -> bool:
    installed = importlib.util.find_spec("flash_mla") and importlib.util.find_spec("sgl_kernel")
    return bool(
        installed
        and torch.cuda.get_device_capability()[0] == 9
        and (cache.spec.v_dim, cache.spec.k_dim, cache.page_size) == (0, LATENT + 64, PAGE)
    )


@BACKENDS.register("flash_mla")
class FlashMlaAttention(PagedAttention):
    def __init__(self, cache: KVCache, device: str) -> None:
        try:
            import flash_mla
            from sgl_kernel import flash_attn
        except ImportError as error:
            raise ValueError(
                "engine.attention_backend=flash_mla needs sgl-flash-mla and sglang-kernel: pip install "
                f"'wideep-toolkit[gpu]', or use attention_backend=auto ({error})"
            ) from None
        if (cache.spec.v_dim, cache.spec.k_dim, cache.page_size) != (0, LATENT + 64, PAGE):
            raise ValueError(
                f"engine.attention_backend=flash_mla needs latent attention of {LATENT} + 64 values and "
                f"page_size={PAGE}, not {cache.spec} with page_size={cache.page_size}: use page_size={PAGE}, or "
                "attention_backend=auto"
            )
        super().__init__(cache, device)
        self._mla: Any = flash_mla.flash_mla_interface
        self._fa3: Any = flash_attn
        one = torch.ones(1, dtype=torch.float32, device=device)
        self._scales = {"is_fp8_kvcache": True, "descale_q": one, "descale_k": one} if cache.fp8 else {}

    def _schedule(self, kind: KindPlan, segment: PagedSegment, heads: int) -> object:
        if segment.first not in kind.scratch:
            meta, _ = self._mla.get_mla_metadata()
            meta.tile_scheduler_metadata, meta.num_splits = self._mla.get_mla_decoding_metadata(
                segment.lens_n, heads, 1, heads, is_fp8_kvcache=self.cache.fp8, use_legacy=True
            )
            kind.scratch[segment.first] = meta
        return kind.scratch[segment.first]

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        kind = plan.layers[layer]
        segment = kind.decode
        if not segment.q_lens:
            return q.new_empty(0, q.shape[1], v_dim)
        assert isinstance(segment, PagedSegment)
        heads = q.shape[1]
        padded = -(-heads // HEADS) * HEADS
        if padded != heads:
            q = torch.cat([q, q.new_zeros(len(q), padded - heads, q.shape[2])], dim=1)
        pages, _ = self.cache.pages(layer)
        if self.cache.fp8:
            q = to_fp8(q)
        out, _ = self._mla.flash_mla_with_kvcache(
            q[:, None], pages, segment.tables_nP, segment.lens_n, v_dim, self._schedule(kind, segment, padded),
            softmax_scale=scale, causal=True, use_legacy=True, **self._scales,
        )  # fmt: skip
        result: Tensor = out[:, 0, :heads]
        return result

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        return ragged_by_fa3(self._fa3, q, k, v, segment, scale)
