"""Grouped-query attention, which every family here but DeepSeek's shares.

T: tokens of the DP group, S: rows of this rank's slice, D: hidden, H: heads of this rank.
Knows checkpoint names (Hugging Face's ``self_attn``) and the KV cache's shape; no family. Read next: ``mixtral.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine import fused
from toolkit.engine.arch import Arch
from toolkit.engine.kv.pool import KVSpec
from toolkit.engine.late import Late, in_parts, late_linear, now
from toolkit.engine.layers import RMSNorm, Rotary
from toolkit.engine.models.base import Forward
from toolkit.engine.parallel import Comm, Groups
from toolkit.engine.weights import Shard, Weights


class Attention:
    """Heads split over the attention TP group. With more ranks than KV heads, each KV head is held by several ranks.

    Args:
        scale: of the scores; None: head_dim^-0.5.
        norms: of each head's query and key before they are rotated, or None.
    """

    def __init__(
        self,
        weights: Weights,
        name: str,
        arch: Arch,
        groups: Groups,
        rotary: Rotary,
        layer: int,
        scale: float | None = None,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> None:
        self.comm = comm = groups.attn_tp
        d, head_dim = arch.hidden_size, arch.kv_values // 2
        q_part = Shard(0, comm.rank, comm.size)
        kv_parts = min(comm.size, arch.kv_heads)
        kv_part = Shard(0, comm.rank * kv_parts // comm.size, kv_parts)
        kv_rows = arch.kv_heads * head_dim
        self.qkv = torch.cat(
            [
                weights.get(f"{name}.q_proj.weight", (arch.num_heads * head_dim, d), q_part),
                weights.get(f"{name}.k_proj.weight", (kv_rows, d), kv_part),
                weights.get(f"{name}.v_proj.weight", (kv_rows, d), kv_part),
            ]
        )
        o_part = Shard(1, comm.rank, comm.size)
        self.o = weights.get(f"{name}.o_proj.weight", (d, arch.num_heads * head_dim), o_part)
        self.heads, self.kv_heads = arch.num_heads // comm.size, local_kv_heads(arch, comm)
        self.head_dim, self.rotary, self.layer = head_dim, rotary, layer
        self.scale = head_dim**-0.5 if scale is None else scale
        self.norms = norms

    def __call__(self, x_SD: Tensor, step: Forward) -> Tensor:
        return now(self.attend(self.prepare(x_SD, step), step))

    def prepare(self, x_SD: Tensor, step: Forward) -> Tensor:
        """Queries of this rank's heads, [T, heads, head_dim]; keys and values go into the cache."""
        x = step.layout.gather(x_SD)
        parts = in_parts(x, self.qkv, early=True)
        product = F.linear(x, self.qkv) if parts is None else parts
        qkv = product.unflatten(-1, (-1, self.head_dim))
        if fused.supported(qkv):
            cache, rows_T = step.attention.cache, step.plan.layers[self.layer].rows_T
            return fused.rotate_and_write(
                qkv, self.norms, self.rotary, step.positions_T, cache.k[self.layer], cache.v[self.layer], rows_T
            )
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        step.attention.write(self.rotary(k, step.positions_T), v, self.layer, step.plan)
        return self.rotary(q, step.positions_T)

    def attend(self, q: Tensor, step: Forward) -> Tensor | Late:
        """Attention over the cache and the output projection, [S, D]."""
        out = step.attention.forward(q, self.layer, step.plan, self.scale)
        if self.comm.size == 1:
            return late_linear(out.flatten(1), self.o)
        return step.layout.reduce_scatter(F.linear(out.flatten(1), self.o))


def local_kv_heads(arch: Arch, comm: Comm) -> int:
    """KV heads that one rank of the attention TP group ``comm`` holds."""
    return arch.kv_heads // min(comm.size, arch.kv_heads)


def kv_spec(arch: Arch, comm: Comm) -> KVSpec:
    """What grouped-query attention caches on one rank of the attention TP group ``comm``."""
    head_dim = arch.kv_values // 2
    return KVSpec(local_kv_heads(arch, comm), head_dim, head_dim)
