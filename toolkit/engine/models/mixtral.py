"""Mixtral: grouped-query attention, every FFN a mixture of SwiGLU experts.

The model to read first; its attention is in ``gqa.py``. T: tokens of the DP group, D: hidden, N: rows with logits.
Checkpoint names and maths are those of Hugging Face's ``MixtralForCausalLM``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from toolkit.engine.arch import Arch
from toolkit.engine.layers import Embedding, LMHead, RMSNorm, Rotary, rope_settings
from toolkit.engine.models.base import MODELS, Forward
from toolkit.engine.models.decoder import Decoder, DecoderLayer
from toolkit.engine.models.gqa import Attention, kv_spec
from toolkit.engine.moe.gate import SoftmaxGate
from toolkit.engine.moe.layer import MoEContext, MoELayer, load_experts
from toolkit.engine.parallel import Groups
from toolkit.engine.weights import Weights


@MODELS.register("mixtral")
class Mixtral:
    def __init__(self, arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> None:
        hf, d = arch.hf, arch.hidden_size
        head_dim, eps = arch.kv_values // 2, hf["rms_norm_eps"]
        self.embed = Embedding(weights, "model.embed_tokens", arch.vocab_size, d)
        rotary = Rotary(head_dim, rope_settings(hf), arch.max_len, device)
        layers: list[DecoderLayer] = []
        for i in range(arch.num_layers):
            name = f"model.layers.{i}"
            ffn = f"{name}.block_sparse_moe"
            gate = weights.get(f"{ffn}.gate.weight", (arch.num_experts, d))
            experts = load_experts(weights, moe, i, _expert_names(ffn), d, arch.moe_intermediate)
            layers.append(
                DecoderLayer(
                    RMSNorm(weights, f"{name}.input_layernorm", d, eps),
                    Attention(weights, f"{name}.self_attn", arch, groups, rotary, i),
                    RMSNorm(weights, f"{name}.post_attention_layernorm", d, eps),
                    MoELayer(moe, i, SoftmaxGate(gate, arch.top_k, renormalize=True), experts),
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


def _expert_names(ffn: str) -> Callable[[int], tuple[str, str, str]]:
    """Checkpoint names of an expert's gate, up and down projections."""
    return lambda expert: (
        f"{ffn}.experts.{expert}.w1.weight",
        f"{ffn}.experts.{expert}.w3.weight",
        f"{ffn}.experts.{expert}.w2.weight",
    )
