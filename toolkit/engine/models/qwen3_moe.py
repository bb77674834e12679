"""Qwen3-MoE: grouped-query attention with normed queries and keys; many small experts, no shared one.

D: hidden. Some layers may have a dense FFN instead (``decoder_sparse_step``, ``mlp_only_layers``: none in the
released models). Checkpoint names and maths are those of Hugging Face's ``Qwen3MoeForCausalLM``.
"""

from __future__ import annotations

from torch import Tensor

from toolkit.engine.arch import Arch
from toolkit.engine.layers import DenseFFN, Embedding, LMHead, RMSNorm, Rotary, rope_settings
from toolkit.engine.models.base import MODELS, Forward
from toolkit.engine.models.decoder import Decoder, DecoderLayer
from toolkit.engine.models.gqa import Attention, kv_spec
from toolkit.engine.moe.gate import SoftmaxGate
from toolkit.engine.moe.layer import MoEContext, MoELayer, load_experts
from toolkit.engine.parallel import Groups
from toolkit.engine.weights import Weights


@MODELS.register("qwen3_moe")
class Qwen3Moe:
    def __init__(self, arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> None:
        hf, d, head_dim = arch.hf, arch.hidden_size, arch.kv_values // 2
        eps = hf["rms_norm_eps"]
        self.embed = Embedding(weights, "model.embed_tokens", arch.vocab_size, d)
        rotary = Rotary(head_dim, rope_settings(hf), arch.max_len, device)
        layers: list[DecoderLayer] = []
        for i in range(arch.num_layers):
            name = f"model.layers.{i}"
            attention = f"{name}.self_attn"
            norms = (
                RMSNorm(weights, f"{attention}.q_norm", head_dim, eps),
                RMSNorm(weights, f"{attention}.k_norm", head_dim, eps),
            )
            layers.append(
                DecoderLayer(
                    RMSNorm(weights, f"{name}.input_layernorm", d, eps),
                    Attention(weights, attention, arch, groups, rotary, i, norms=norms),
                    RMSNorm(weights, f"{name}.post_attention_layernorm", d, eps),
                    _moe_layer(weights, f"{name}.mlp", arch, moe, arch.moe_layers.index(i))
                    if i in arch.moe_layers
                    else DenseFFN(weights, f"{name}.mlp", d, arch.dense_intermediate, groups.dense),
                )
            )
        self.decoder = Decoder(layers, RMSNorm(weights, "model.norm", d, eps))
        tied = self.embed if arch.tied else None
        self.head = LMHead.load(weights, "lm_head", arch.vocab_size, d, groups, tied)
        self.kv_spec = kv_spec(arch, groups.attn_tp)

    def forward(self, tokens_T: Tensor, step: Forward) -> Tensor:
        x = step.layout.scatter(self.embed(tokens_T))
        return self.decoder(x, step)

    def logits(self, hidden_ND: Tensor, dp_rows: tuple[int, ...]) -> Tensor:
        return self.head(hidden_ND, dp_rows)


def _moe_layer(weights: Weights, name: str, arch: Arch, moe: MoEContext, index: int) -> MoELayer:
    def names(expert: int) -> tuple[str, str, str]:
        base = f"{name}.experts.{expert}"
        return f"{base}.gate_proj.weight", f"{base}.up_proj.weight", f"{base}.down_proj.weight"

    weight = weights.get(f"{name}.gate.weight", (arch.num_experts, arch.hidden_size))
    gate = SoftmaxGate(weight, arch.top_k, renormalize=arch.hf.get("norm_topk_prob", False))
    return MoELayer(moe, index, gate, load_experts(weights, moe, index, names, arch.hidden_size, arch.moe_intermediate))
