"""Reference attention on torch's scaled_dot_product_attention, request by request. The CPU backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.attention.backend import BACKENDS, AttentionPlan, KindPlan, Segment
from toolkit.engine.core import Batch
from toolkit.engine.kv.kinds import first_token
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.staging import Ints


@dataclass(frozen=True)
class RowSegment(Segment):
    """``kv_rows``: of each request, the cache rows of the tokens that its queries see, this step's included."""

    kv_rows: tuple[Tensor, ...]


@BACKENDS.register("sdpa")
class SdpaAttention:
    capturable = False

    def __init__(self, cache: KVCache, device: str) -> None:
        self.cache, self.device = cache, device

    def plan(self, batch: Batch) -> AttentionPlan:
        by_layer: dict[int, KindPlan] = {}
        for index, kind in enumerate(self.cache.kinds):
            by_layer |= dict.fromkeys(kind.layers, self._plan_kind(batch, index, kind.window))
        return AttentionPlan(tuple(by_layer[layer] for layer in range(len(by_layer))))

    def write(self, k: Tensor, v: Tensor | None, layer: int, plan: AttentionPlan) -> None:
        self.cache.write(layer, plan.layers[layer].rows_T, k, v)

    def forward(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
        kind = plan.layers[layer]
        keys, values = self.cache.k[layer], self.cache.v[layer]
        parts = [
            _attend(q_r, keys[rows], values[rows], scale, kind.window)
            for segment in (kind.decode, kind.prefill)
            for q_r, rows in zip(q[segment.tokens].split(segment.q_lens), _rows_of(segment))
        ]
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], values.shape[-1])

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        parts = []
        for q_r, rows in zip(q.split(1), _rows_of(plan.layers[layer].decode)):
            k_r = self.cache.read(layer, rows)
            parts.append(_attend(q_r, k_r, k_r[..., :v_dim], scale))
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v_dim)

    def gather(self, layer: int, segment: Segment) -> Tensor:
        rows = _rows_of(segment)
        return self.cache.read(layer, torch.cat(rows)) if rows else self.cache.k[layer][:0].to(self.cache.dtype)

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        kv_lens = [len(rows) for rows in _rows_of(segment)]
        parts = [
            _attend(q_r, k_r, v_r, scale)
            for q_r, k_r, v_r in zip(q.split(segment.q_lens), k.split(kv_lens), v.split(kv_lens))
        ]
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v.shape[-1])

    def static_shapes(self, size: int, max_len: int) -> list[tuple[int, ...]]:
        raise AssertionError("sdpa loops over requests on the host and cannot be captured")

    def static_plan(self, size: int, max_len: int, views: list[Tensor]) -> AttentionPlan:
        raise AssertionError("sdpa loops over requests on the host and cannot be captured")

    def static_arrays(self, batch: Batch, size: int, max_len: int) -> list[Ints]:
        raise AssertionError("sdpa loops over requests on the host and cannot be captured")

    def _plan_kind(self, batch: Batch, kind: int, window: int) -> KindPlan:
        rows: list[Tensor] = []
        segments: list[RowSegment] = []
        first = 0
        for part in (batch.decode, batch.prefill):
            kv_rows: list[Tensor] = []
            for scheduled in part:
                begin = first_token(window, scheduled.begin)
                seen = _rows(scheduled.request.blocks[kind], begin, scheduled.end, self.cache.page_size)
                kv_rows.append(seen.to(self.device))
                rows.append(seen[len(seen) - scheduled.num_tokens :])
            q_lens = tuple(s.num_tokens for s in part)
            segments.append(RowSegment(first, q_lens, tuple(kv_rows)))
            first += sum(q_lens)
        rows_T = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
        return KindPlan(window, rows_T.to(self.device), segments[0], segments[1])


def _rows_of(segment: Segment) -> tuple[Tensor, ...]:
    assert isinstance(segment, RowSegment), f"a plan of another backend: {type(segment).__name__}"
    return segment.kv_rows


def _rows(table: list[int], begin: int, end: int, page_size: int) -> Tensor:
    """Cache rows of tokens begin..end-1."""
    skipped = begin // page_size
    blocks = torch.tensor(table[skipped : -(-end // page_size)], dtype=torch.long)
    rows = (blocks[:, None] * page_size + torch.arange(page_size)).flatten()
    return rows[begin - skipped * page_size : end - skipped * page_size]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """One request: q [n, H, dk] are the last n of the m tokens of k [m, Hkv, dk], v [m, Hkv, dv] -> [n, H, dv]."""
    n, m = q.shape[0], k.shape[0]
    mask = None
    if n > 1 or 0 < window < m:
        distance = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        mask = (distance >= 0) & (distance < window) if window else distance >= 0
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)
