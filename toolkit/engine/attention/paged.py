"""What backends share whose kernels read the cache through block tables: plans, eager and static.

A plan is a few int32 arrays, made with numpy and copied to the device at once. A static plan has fixed shapes, for CUDA
graphs: padding requests attend one row of the cache's spare block. Subclasses supply the kernels (``_paged``,
``decode``, ``ragged``). n: requests of a segment, P: blocks of the longest. Read next: ``fa3.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.attention.backend import AttentionPlan, KindPlan, Segment
from toolkit.engine.core import Batch, ScheduledRequest
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.staging import Ints, ints, to_device


@dataclass(frozen=True)
class PagedSegment(Segment):
    """All tensors int32.

    Attributes:
        lens_n: tokens of each request in the cache, this step's included.
        tables_nP: its blocks; where a window has moved on, any block.
        cu_q, cu_kv: [n + 1], where each request's queries, and its gathered keys, begin.
        kv_rows: rows of all cached tokens of the segment; empty but for MLA's prefill.
        max_q, max_kv: the longest of each.
    """

    lens_n: Tensor
    tables_nP: Tensor
    cu_q: Tensor
    cu_kv: Tensor
    kv_rows: Tensor
    max_q: int
    max_kv: int


class PagedAttention:
    """Plans, writes and gathers; the kernels are the subclass's."""

    capturable = True

    def __init__(self, cache: KVCache, device: str) -> None:
        self.cache, self.device = cache, device
        self.latent = cache.spec.v_dim == 0  # MLA: prefill gathers keys

    # --- the kernels ------------------------------------------------------------------------------

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        """q [tokens of the segment, H, k_dim] over the cache -> [tokens, H, v_dim]."""
        raise NotImplementedError

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        raise NotImplementedError

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        raise NotImplementedError

    # --- the seam ---------------------------------------------------------------------------------

    def plan(self, batch: Batch) -> AttentionPlan:
        arrays: list[Ints] = []
        for index in range(len(self.cache.kinds)):
            for part in (batch.decode, batch.prefill):
                arrays += self._arrays(part, index, gathers=self.latent and part is batch.prefill)
        tensors = to_device(arrays, self.device)
        lens = [(tuple(s.num_tokens for s in part), max((s.end for s in part), default=0))
                for part in (batch.decode, batch.prefill)]  # fmt: skip
        return self._assemble(tensors, lens)

    def write(self, k: Tensor, v: Tensor | None, layer: int, plan: AttentionPlan) -> None:
        self.cache.write(layer, plan.layers[layer].rows_T, k, v)

    def forward(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
        kind = plan.layers[layer]
        parts = [
            self._paged(q[s.tokens], layer, kind, _paged(s), scale) for s in (kind.decode, kind.prefill) if s.q_lens
        ]
        if not parts:
            return q.new_empty(0, q.shape[1], self.cache.spec.v_dim)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gather(self, layer: int, segment: Segment) -> Tensor:
        return self.cache.read(layer, _paged(segment).kv_rows)

    # --- fixed shapes -----------------------------------------------------------------------------

    def static_shapes(self, size: int, max_len: int) -> list[tuple[int, ...]]:
        blocks = -(-max_len // self.cache.page_size)
        return [(size,), (size,), (size, blocks), (size + 1,), (size + 1,), (0,)] * len(self.cache.kinds)

    def static_plan(self, size: int, max_len: int, views: list[Tensor]) -> AttentionPlan:
        nothing = self._arrays((), 0, gathers=False)
        per_kind = len(nothing)
        empty = to_device(nothing, self.device)
        tensors: list[Tensor] = []
        for first in range(0, len(views), per_kind):
            tensors += views[first : first + per_kind] + empty
        return self._assemble(tensors, [((1,) * size, max_len), ((), 0)])

    def static_arrays(self, batch: Batch, size: int, max_len: int) -> list[Ints]:
        assert not batch.prefill and len(batch.decode) <= size, f"{batch.num_tokens} tokens for a graph of {size}"
        blocks = -(-max_len // self.cache.page_size)
        arrays: list[Ints] = []
        for index in range(len(self.cache.kinds)):
            arrays += self._arrays(batch.decode, index, gathers=False, size=size, blocks=blocks)
        return arrays

    # --- inside -----------------------------------------------------------------------------------

    def _arrays(
        self, part: Sequence[ScheduledRequest], kind: int, gathers: bool, size: int = 0, blocks: int = 0
    ) -> list[Ints]:
        """rows_T, lens_n, tables_nP, cu_q, cu_kv, kv_rows of the requests, padded to ``size`` of ``blocks``."""
        page, num = self.cache.page_size, max(len(part), size)
        tables = [s.request.blocks[kind] for s in part]
        wide = blocks or max((len(t) for t in tables), default=0)
        tables_nP = np.zeros((num, wide), np.int32)
        for i, table in enumerate(tables):
            tables_nP[i, : len(table)] = table[:wide]
        q_lens, lens = np.ones(num, np.int32), np.ones(num, np.int32)
        q_lens[: len(part)] = [s.num_tokens for s in part]
        lens[: len(part)] = [s.end for s in part]
        tables_nP[len(part) :] = self.cache.kinds[kind].num_blocks  # the spare block
        np.maximum(tables_nP, 0, out=tables_nP)
        cu_q, cu_kv = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (q_lens, lens))
        request_T = np.repeat(np.arange(num), q_lens)
        positions_T = np.arange(len(request_T)) - (cu_q[1:] - lens)[request_T]
        rows_T = tables_nP[request_T, positions_T // page] * page + positions_T % page
        kv_rows = np.zeros(0, np.int32)
        if gathers and num:
            kv_rows = np.concatenate(
                [(t[:, None] * page + np.arange(page)).ravel()[:n] for t, n in zip(tables_nP, lens)]
            )
        return [ints(rows_T), lens, tables_nP, cu_q, cu_kv, ints(kv_rows)]

    def _assemble(self, tensors: list[Tensor], lens: list[tuple[tuple[int, ...], int]]) -> AttentionPlan:
        """The tensors of decode and prefill, kind by kind, as ``_arrays`` orders them."""
        by_layer: dict[int, KindPlan] = {}
        parts = iter(tensors)
        for kind in self.cache.kinds:
            rows: list[Tensor] = []
            segments: list[PagedSegment] = []
            for q_lens, max_kv in lens:
                rows.append(next(parts))
                lens_n, tables_nP, cu_q, cu_kv, kv_rows = (next(parts) for _ in range(5))
                first = segments[0].num_tokens if segments else 0
                segments.append(
                    PagedSegment(first, q_lens, lens_n, tables_nP, cu_q, cu_kv, kv_rows, max(q_lens, default=0), max_kv)
                )
            used = [r for r in rows if len(r)]
            rows_T = used[0] if len(used) == 1 else torch.cat(rows)
            by_layer |= dict.fromkeys(kind.layers, KindPlan(kind.window, rows_T, segments[0], segments[1]))
        return AttentionPlan(tuple(by_layer[layer] for layer in range(len(by_layer))))


def _paged(segment: Segment) -> PagedSegment:
    assert isinstance(segment, PagedSegment), f"a plan of another backend: {type(segment).__name__}"
    return segment


def refuse_fp8(cache: KVCache, backend: str) -> None:
    """For backends that read the cache in the model's type alone."""
    if cache.fp8:
        raise ValueError(
            f"engine.kv_cache_dtype=fp8_e4m3 is read by flash_mla and sdpa, not by attention_backend={backend}: use "
            "attention_backend=flash_mla, or kv_cache_dtype=auto"
        )


def window_of(window: int) -> tuple[int, int]:
    """FlashAttention's (left, right), own token not counted: everything before, or a sliding window."""
    return (window - 1, 0) if window else (-1, 0)


def ragged_by_fa3(flash_attn: Any, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
    """Causal attention over given keys and values, each request's queries being its last tokens.

    Args:
        flash_attn: the module of that name in sglang-kernel.
    """
    s = _paged(segment)
    if not s.q_lens:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    out: Tensor = flash_attn.flash_attn_varlen_func(
        q, k, v, s.cu_q, s.cu_kv, s.max_q, s.max_kv, softmax_scale=scale, causal=True
    )
    return out
