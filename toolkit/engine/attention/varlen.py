"""torch's own paged FlashAttention (``torch.nn.attention.varlen``): nothing to install, pages of 256 tokens.

FlashAttention 2, so that prefill reaches about half of what Hopper can do. MLA is not its business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.engine.attention.backend import BACKENDS, AttentionPlan, KindPlan, Segment
from toolkit.engine.attention.paged import PagedAttention, PagedSegment, window_of
from toolkit.engine.kv.pool import KVCache

PAGE = 256  # a page must be a multiple


def fits(cache: KVCache) -> bool:
    return cache.page_size % PAGE == 0 and cache.spec.v_dim == cache.spec.k_dim <= 256


@BACKENDS.register("varlen")
class VarlenAttention(PagedAttention):
    def __init__(self, cache: KVCache, device: str) -> None:
        if not fits(cache):
            raise ValueError(
                f"engine.attention_backend=varlen needs a page_size that is a multiple of {PAGE} and grouped-query "
                f"attention of at most 256 values a head, not page_size={cache.page_size} with {cache.spec}: use "
                f"page_size={PAGE}, or attention_backend=auto"
            )
        super().__init__(cache, device)

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        k, v = self.cache.pages(layer)
        out = varlen_attn(
            q, k, v, segment.cu_q, segment.cu_kv, segment.max_q, segment.max_kv, scale=scale,
            window_size=window_of(kind.window), enable_gqa=q.shape[1] != k.shape[2],
            seqused_k=segment.lens_n, block_table=segment.tables_nP,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        raise ValueError("engine.attention_backend=varlen does not do latent attention: use auto, flash_mla or fa3")

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        raise ValueError("engine.attention_backend=varlen does not do latent attention: use auto, flash_mla or fa3")
