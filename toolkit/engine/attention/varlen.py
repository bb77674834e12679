"""torch's own paged FlashAttention (``torch.nn.attention.varlen``): nothing to install, pages of 256 tokens.

FlashAttention 2, so that prefill reaches about half of what Hopper can do. Not for MLA, nor for sliding windows: with a
window and one query a request torch 2.14.1 gives NaN (seen on an H200).
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from toolkit.engine.attention.backend import BACKENDS, AttentionPlan, KindPlan, Segment
from toolkit.engine.attention.paged import PagedAttention, PagedSegment, refuse_fp8, window_of
from toolkit.engine.kv.pool import KVCache

PAGE = 256  # a page must be a multiple


def fits(cache: KVCache) -> bool:
    sliding = any(kind.window for kind in cache.kinds)
    return cache.page_size % PAGE == 0 and cache.spec.v_dim == cache.spec.k_dim <= 256 and not sliding


@BACKENDS.register("varlen")
class VarlenAttention(PagedAttention):
    def __init__(self, cache: KVCache, device: str) -> None:
        if not fits(cache):
            raise ValueError(
                f"engine.attention_backend=varlen needs a page_size that is a multiple of {PAGE} and grouped-query "
                f"attention of at most 256 values a head without windows, not page_size={cache.page_size} with "
                f"{cache.spec} and windows {[kind.window for kind in cache.kinds]}: use page_size={PAGE}, or "
                "attention_backend=auto"
            )
        refuse_fp8(cache, "varlen")
        super().__init__(cache, device)
        with suppress(RuntimeError):  # torch asks for cuDNN's version; an older one than its own says so once
            torch.backends.cudnn.version()

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        k, v = self.cache.pages(layer)
        # with one query a request it packs the heads that share a key, if there is nothing to mask
        window = (-1, -1) if segment.max_q == 1 else window_of(0)
        out = varlen_attn(
            q, k, v, segment.cu_q, segment.cu_kv, segment.max_q, segment.max_kv,
            scale=scale, window_size=window, enable_gqa=q.shape[1] != k.shape[2],
            seqused_k=segment.lens_n, block_table=segment.tables_nP,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        raise ValueError("engine.attention_backend=varlen does not do latent attention: use auto, flash_mla or fa3")

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        raise ValueError("engine.attention_backend=varlen does not do latent attention: use auto, flash_mla or fa3")
