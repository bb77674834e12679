"""Mixtral: grouped-query attention, every FFN a mixture of SwiGLU experts.

The model to read first. T: tokens of the DP group, S: rows of this rank's slice, D: hidden, H: heads of this rank.
Checkpoint names and maths are those of Hugging Face's ``MixtralForCausalLM``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.arch import Arch
from toolkit.engine.kv.pool import KVSpec
from toolkit.engine.layers import Embedding, LMHead, RMSNorm, Rotary, rope_settings
from toolkit.engine.models.base import MODELS, Forward
from toolkit.engine.moe.gate import SoftmaxGate
from toolkit.engine.moe.layer import MoEContext, MoELayer, load_experts
from toolkit.engine.parallel import Groups
from toolkit.engine.weights import Shard, Weights


class Attention:
    """Grouped-query attention, heads split over the attention TP group.

    With more ranks than KV heads, each KV head is held by several ranks.
    """

    def __init__(self, weights: Weights, name: str, arch: Arch, groups: Groups, rotary: Rotary, layer: int) -> None:
        comm, d, head_dim = groups.attn_tp, arch.hidden_size, arch.kv_values // 2
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
        self.heads, self.kv_heads = arch.num_heads // comm.size, arch.kv_heads // kv_parts
        self.head_dim, self.rotary, self.layer = head_dim, rotary, layer
        self.window = arch.hf.get("sliding_window") or 0

    def __call__(self, x_SD: Tensor, step: Forward) -> Tensor:
        x = step.layout.gather(x_SD)
        qkv = F.linear(x, self.qkv).unflatten(1, (-1, self.head_dim))
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = self.rotary(q, step.positions_T), self.rotary(k, step.positions_T)
        scale = self.head_dim**-0.5
        out = step.attention.forward(q, k, v, self.layer, self.window, step.plan, scale)
        return step.layout.reduce_scatter(F.linear(out.flatten(1), self.o))


@MODELS.register("mixtral")
class Mixtral:
    def __init__(self, arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> None:
        hf, d = arch.hf, arch.hidden_size
        head_dim, eps = arch.kv_values // 2, hf["rms_norm_eps"]
        self.embed = Embedding(weights, "model.embed_tokens", arch.vocab_size, d)
        rotary = Rotary(head_dim, rope_settings(hf), arch.max_len, device)
        self.layers: list[tuple[RMSNorm, Attention, RMSNorm, MoELayer]] = []
        for i in range(arch.num_layers):
            name = f"model.layers.{i}"
            ffn = f"{name}.block_sparse_moe"
            gate = weights.get(f"{ffn}.gate.weight", (arch.num_experts, d))
            experts = load_experts(weights, moe, i, _expert_names(ffn), d, arch.moe_intermediate)
            self.layers.append(
                (
                    RMSNorm(weights, f"{name}.input_layernorm", d, eps),
                    Attention(weights, f"{name}.self_attn", arch, groups, rotary, i),
                    RMSNorm(weights, f"{name}.post_attention_layernorm", d, eps),
                    MoELayer(moe, i, SoftmaxGate(gate, arch.top_k, renormalize=True), experts),
                )
            )
        self.norm = RMSNorm(weights, "model.norm", d, eps)
        tied = self.embed if arch.tied else None
        self.head = LMHead.load(weights, "lm_head", arch.vocab_size, d, groups, tied)
        self.kv_spec = KVSpec(arch.num_layers, self.layers[0][1].kv_heads, head_dim, head_dim)

    def forward(self, tokens_T: Tensor, step: Forward) -> Tensor:
        x = step.layout.scatter(self.embed(tokens_T))
        for attention_norm, attention, ffn_norm, ffn in self.layers:
            x = x + attention(attention_norm(x), step)
            x = x + ffn(ffn_norm(x), step.layout)
        return self.norm(x)

    def logits(self, hidden_ND: Tensor, dp_rows: tuple[int, ...]) -> Tensor:
        return self.head(hidden_ND, dp_rows)


def _expert_names(ffn: str) -> Callable[[int], tuple[str, str, str]]:
    """Checkpoint names of an expert's gate, up and down projections."""
    return lambda expert: (
        f"{ffn}.experts.{expert}.w1.weight",
        f"{ffn}.experts.{expert}.w3.weight",
        f"{ffn}.experts.{expert}.w2.weight",
    )
