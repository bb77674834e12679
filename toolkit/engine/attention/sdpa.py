"""Reference attention on torch's scaled_dot_product_attention, request by request. The CPU backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.attention.backend import BACKENDS, AttentionPlan, Segment, plan_segments
from toolkit.engine.core import Batch
from toolkit.engine.kv.pool import KVCache


@BACKENDS.register("sdpa")
class SdpaAttention:
    def __init__(self, cache: KVCache, device: str) -> None:
        self.cache, self.device = cache, device

    def plan(self, batch: Batch) -> AttentionPlan:
        return plan_segments(batch, self.cache, self.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
        kind = plan.layers[layer]
        self.cache.write(layer, kind.rows_T, k, v)
        keys, values = self.cache.k[layer], self.cache.v[layer]
        parts = [
            _attend(q_r, keys[rows], values[rows], scale, kind.window)
            for segment in (kind.decode, kind.prefill)
            for q_r, rows in zip(q[segment.tokens].split(segment.q_lens), segment.kv_rows)
        ]
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], values.shape[-1])

    def write(self, k: Tensor, layer: int, plan: AttentionPlan) -> None:
        self.cache.write(layer, plan.layers[layer].rows_T, k, None)

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        keys = self.cache.k[layer]
        parts = []
        for q_r, rows in zip(q.split(1), plan.layers[layer].decode.kv_rows):
            k_r = keys[rows]
            parts.append(_attend(q_r, k_r, k_r[..., :v_dim], scale))
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v_dim)

    def gather(self, layer: int, segment: Segment) -> Tensor:
        if not segment.kv_rows:
            return self.cache.k[layer][:0]
        return self.cache.k[layer][torch.cat(segment.kv_rows)]

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        parts = [
            _attend(q_r, k_r, v_r, scale)
            for q_r, k_r, v_r in zip(q.split(segment.q_lens), k.split(segment.kv_lens), v.split(segment.kv_lens))
        ]
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v.shape[-1])


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
