"""DeepSeek-V3: multi-head latent attention, leading dense layers, sigmoid gate limited to groups, a shared expert.

T: tokens of the DP group, S: rows of this rank's slice, D: hidden, H: heads of this rank, C: latent (kv_lora_rank),
N, R, V: per-head sizes of the unrotated part, the rotated part and the values.
The cache holds one vector a token: the normed latent and the rotated key, C + R values, shared by all heads.
Decode is absorbed: queries move into the latent space, so the cache is read as it is. Prefill expands keys and
values from the latent, which costs less arithmetic when a chunk has many tokens.
Checkpoint names and maths are those of Hugging Face's ``DeepseekV3ForCausalLM``; its layers after the last, for
multi-token prediction, are not read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toolkit.engine import fused
from toolkit.engine.arch import Arch
from toolkit.engine.kv.pool import KVSpec
from toolkit.engine.layers import DenseFFN, Embedding, LMHead, RMSNorm, Rotary, linear, rope_settings, yarn_mscale
from toolkit.engine.models.base import MODELS, Forward
from toolkit.engine.models.decoder import Decoder, DecoderLayer
from toolkit.engine.moe.gate import GroupedSigmoidGate
from toolkit.engine.moe.layer import MoEContext, MoELayer, load_experts
from toolkit.engine.parallel import Comm, Groups
from toolkit.engine.weights import Shard, Weights


class LatentAttention:
    """MLA, heads split over the attention TP group; the latent projections and the cache are on every rank."""

    def __init__(self, weights: Weights, name: str, arch: Arch, groups: Groups, rotary: Rotary, layer: int) -> None:
        hf, comm, d = arch.hf, groups.attn_tp, arch.hidden_size
        self.nope, self.rope, self.v_dim = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
        self.latent, self.heads = hf["kv_lora_rank"], arch.num_heads // comm.size
        self.rotary, self.layer = rotary, layer
        self.scale = _softmax_scale(arch, self.nope + self.rope)
        by_head = Shard(0, comm.rank, comm.size)
        q_rows, eps = arch.num_heads * (self.nope + self.rope), hf["rms_norm_eps"]
        q_lora = hf.get("q_lora_rank")
        self.q_down = weights.get_matrix(f"{name}.q_a_proj.weight", (q_lora, d)) if q_lora else None
        self.q_norm = RMSNorm(weights, f"{name}.q_a_layernorm", q_lora, eps) if q_lora else None
        q_name = "q_b_proj" if q_lora else "q_proj"
        self.q_up = weights.get_matrix(f"{name}.{q_name}.weight", (q_rows, q_lora or d), by_head)
        self.kv_down = weights.get_matrix(f"{name}.kv_a_proj_with_mqa.weight", (self.latent + self.rope, d))
        self.kv_norm = RMSNorm(weights, f"{name}.kv_a_layernorm", self.latent, eps)
        kv_shape = (arch.num_heads * (self.nope + self.v_dim), self.latent)
        kv_up = weights.get(f"{name}.kv_b_proj.weight", kv_shape, by_head)
        # [H, N, C] and [H, V, C]
        self.k_up, self.v_up = torch.split(kv_up.view(self.heads, -1, self.latent), [self.nope, self.v_dim], dim=1)
        o_shape = d, arch.num_heads * self.v_dim
        self.o = weights.get_matrix(f"{name}.o_proj.weight", o_shape, Shard(1, comm.rank, comm.size))

    def prepare(self, x_SD: Tensor, step: Forward) -> Tensor:
        """Queries [T, H, N + R]; each token's latent and rotated key go into the cache."""
        x = step.layout.gather(x_SD)
        q = self._queries(x, step.positions_T)
        kv = linear(x, self.kv_down)
        if fused.supported(kv):
            cache, rows_T = step.attention.cache.k[self.layer], step.plan.layers[self.layer].rows_T
            fused.write_latent(kv, self.kv_norm, self.rotary, step.positions_T, cache, rows_T)
            return q
        c, k_rope = kv.split([self.latent, self.rope], dim=-1)
        k_rope = self.rotary(k_rope[:, None], step.positions_T)
        step.attention.write(torch.cat([self.kv_norm(c)[:, None], k_rope], dim=-1), None, self.layer, step.plan)
        return q

    def attend(self, q: Tensor, step: Forward) -> Tensor:
        """Attention over the cache and the output projection, [S, D]."""
        plan = step.plan.layers[self.layer]
        parts = [self._decode(q[plan.decode.tokens], step)] if plan.decode.q_lens or not plan.prefill.q_lens else []
        parts += [self._prefill(q, step)] if plan.prefill.q_lens else []
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return step.layout.reduce_scatter(linear(out.flatten(1), self.o))

    def _queries(self, x: Tensor, positions_T: Tensor) -> Tensor:
        """[T, H, N + R], the last R rotated."""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(linear(x, self.q_down))
        q = linear(x, self.q_up).view(len(x), self.heads, self.nope + self.rope)
        if fused.supported(q):
            fused.rotate_pairs(q[..., self.nope :], self.rotary, positions_T)
            return q
        nope, rope = q.split([self.nope, self.rope], dim=-1)
        return torch.cat([nope, self.rotary(rope, positions_T)], dim=-1)

    def _decode(self, q: Tensor, step: Forward) -> Tensor:
        """Absorbed: q' = q W_UK in latent space, the output expanded by W_UV."""
        nope, rope = q.split([self.nope, self.rope], dim=-1)
        absorbed = q.new_empty(len(q), self.heads, self.latent + self.rope)
        torch.bmm(nope.transpose(0, 1), self.k_up, out=absorbed[..., : self.latent].transpose(0, 1))
        absorbed[..., self.latent :] = rope
        latent = step.attention.decode(absorbed, self.layer, step.plan, self.scale, self.latent)
        out = q.new_empty(len(q), self.heads, self.v_dim)
        torch.bmm(latent.transpose(0, 1), self.v_up.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def _prefill(self, q: Tensor, step: Forward) -> Tensor:
        """Expanded: keys and values of every head from the cached latents of the prefilling requests."""
        segment = step.plan.layers[self.layer].prefill
        c, k_rope = step.attention.gather(self.layer, segment)[:, 0].split([self.latent, self.rope], dim=-1)
        k_nope = torch.einsum("mc,hnc->mhn", c, self.k_up)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, self.heads, -1)], dim=-1)
        v = torch.einsum("mc,hvc->mhv", c, self.v_up)
        return step.attention.ragged(q[segment.tokens], k, v, segment, self.scale)


@MODELS.register("deepseek_v3")
class DeepseekV3:
    def __init__(self, arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> None:
        hf, d = arch.hf, arch.hidden_size
        eps = hf["rms_norm_eps"]
        self.embed = Embedding(weights, "model.embed_tokens", arch.vocab_size, d)
        rotary = Rotary(hf["qk_rope_head_dim"], rope_settings(hf), arch.max_len, device, interleaved=True)
        layers: list[DecoderLayer] = []
        for i in range(arch.num_layers):
            name = f"model.layers.{i}"
            ffn: DenseFFN | MoELayer
            if i in arch.moe_layers:
                ffn = _moe_layer(weights, f"{name}.mlp", arch, moe, arch.moe_layers.index(i))
            else:
                ffn = DenseFFN(weights, f"{name}.mlp", d, arch.dense_intermediate, groups.dense)
            layers.append(
                DecoderLayer(
                    RMSNorm(weights, f"{name}.input_layernorm", d, eps),
                    LatentAttention(weights, f"{name}.self_attn", arch, groups, rotary, i),
                    RMSNorm(weights, f"{name}.post_attention_layernorm", d, eps),
                    ffn,
                )
            )
        for i in range(arch.num_layers, arch.num_layers + (hf.get("num_nextn_predict_layers") or 0)):
            weights.skip(f"model.layers.{i}.", "multi-token prediction, which is not served")
        self.decoder = Decoder(layers, RMSNorm(weights, "model.norm", d, eps))
        tied = self.embed if arch.tied else None
        self.head = LMHead.load(weights, "lm_head", arch.vocab_size, d, groups, tied)
        self.kv_spec = KVSpec(1, arch.kv_values, 0)

    def forward(self, tokens_T: Tensor, step: Forward) -> Tensor:
        x = step.layout.scatter(self.embed(tokens_T))
        return self.decoder(x, step)

    def logits(self, hidden_ND: Tensor, dp_rows: tuple[int, ...]) -> Tensor:
        return self.head(hidden_ND, dp_rows)


def _moe_layer(weights: Weights, name: str, arch: Arch, moe: MoEContext, index: int) -> MoELayer:
    hf, d = arch.hf, arch.hidden_size
    gate = GroupedSigmoidGate(
        weights.get(f"{name}.gate.weight", (arch.num_experts, d)),
        weights.get(f"{name}.gate.e_score_correction_bias", (arch.num_experts,), dtype=torch.float32),
        top_k=arch.top_k, n_group=hf["n_group"], topk_group=hf["topk_group"],
        renormalize=hf["norm_topk_prob"], scale=hf["routed_scaling_factor"],
    )  # fmt: skip

    def names(expert: int) -> tuple[str, str, str]:
        base = f"{name}.experts.{expert}"
        return f"{base}.gate_proj.weight", f"{base}.up_proj.weight", f"{base}.down_proj.weight"

    experts = load_experts(weights, moe, index, names, d, arch.moe_intermediate)
    shared: Callable[[Tensor], Tensor] | None = None
    if arch.shared_intermediate:
        # each rank owns its rows, so the shared expert runs on them where they are
        alone = Comm([0], 0, None)
        ffn = DenseFFN(weights, f"{name}.shared_experts", d, arch.shared_intermediate, alone)
        shared = ffn.local
    return MoELayer(moe, index, gate, experts, shared)


def _softmax_scale(arch: Arch, head_dim: int) -> float:
    """head_dim^-0.5, times YaRN's mscale squared (facts of the released model: 1.36889^2)."""
    rope = rope_settings(arch.hf)
    if rope["rope_type"] != "yarn" or not rope.get("mscale_all_dim"):
        return float(head_dim**-0.5)
    return float(head_dim**-0.5) * yarn_mscale(float(rope["factor"]), rope["mscale_all_dim"]) ** 2
