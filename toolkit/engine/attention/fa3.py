"""FlashAttention 3 with paged KV, from the package sglang-kernel: Hopper, any page size, windows, MLA.

Latent attention runs as SGLang does it: the rotated part of query and key as q and k, the latent part as ``qv`` and v.
The tile schedule is worked out on the device in the first layer of a step, for all (``_schedule``).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.attention.backend import BACKENDS, AttentionPlan, KindPlan, Segment
from toolkit.engine.attention.paged import PagedAttention, PagedSegment, ragged_by_fa3, refuse_fp8, window_of
from toolkit.engine.kv.pool import KVCache

HEAD_DIMS = (64, 96, 128, 192, 256)


def fits(cache: KVCache) -> bool:
    hopper = torch.cuda.get_device_capability()[0] == 9
    spec = cache.spec
    dims = spec.k_dim in HEAD_DIMS if spec.v_dim else spec.k_dim == 576
    return hopper and dims and importlib.util.find_spec("sgl_kernel") is not None


@BACKENDS.register("fa3")
class Fa3Attention(PagedAttention):
    schedule_once = True  # False: in every layer, for comparison

    def __init__(self, cache: KVCache, device: str) -> None:
        try:
            from sgl_kernel import flash_attn
        except ImportError as error:
            raise ValueError(
                "engine.attention_backend=fa3 needs the package sglang-kernel: pip install 'wideep-toolkit[gpu]', or "
                f"use attention_backend=auto ({error})"
            ) from None
        refuse_fp8(cache, "fa3")
        super().__init__(cache, device)
        self._fa3: Any = flash_attn

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        k, v = self.cache.pages(layer)
        out: Tensor = self._fa3.flash_attn_with_kvcache(
            q, k, v, page_table=segment.tables_nP, cache_seqlens=segment.lens_n, cu_seqlens_q=segment.cu_q,
            max_seqlen_q=segment.max_q, softmax_scale=scale, causal=True, window_size=_window(kind.window),
            scheduler_metadata=self._schedule(q, kind, segment) if self.schedule_once else None,
        )  # fmt: skip
        return out

    def _schedule(self, q: Tensor, kind: KindPlan, segment: PagedSegment) -> Tensor:
        if segment.first not in kind.scratch:
            spec, page = self.cache.spec, self.cache.page_size
            kind.scratch[segment.first] = self._fa3.get_scheduler_metadata(
                len(segment.q_lens), segment.max_q, segment.tables_nP.shape[1] * page, q.shape[1], spec.heads,
                spec.k_dim, segment.lens_n, qkv_dtype=q.dtype, headdim_v=spec.v_dim, cu_seqlens_q=segment.cu_q,
                page_size=page, causal=True, window_size=_window(kind.window),
            )  # fmt: skip
        made: Tensor = kind.scratch[segment.first]
        return made

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        segment = plan.layers[layer].decode
        assert isinstance(segment, PagedSegment)
        if not segment.q_lens:
            return q.new_empty(0, q.shape[1], v_dim)
        pages, _ = self.cache.pages(layer)
        out: Tensor = self._fa3.flash_attn_with_kvcache(
            q[..., v_dim:].contiguous(), pages[..., v_dim:], pages[..., :v_dim], qv=q[..., :v_dim].contiguous(),
            page_table=segment.tables_nP, cache_seqlens=segment.lens_n, cu_seqlens_q=segment.cu_q,
            max_seqlen_q=1, softmax_scale=scale, causal=True,
        )  # fmt: skip
        return out

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        return ragged_by_fa3(self._fa3, q, k, v, segment, scale)


def _window(window: int) -> tuple[int, int]:
    return window_of(window) if window else (-1, -1)
