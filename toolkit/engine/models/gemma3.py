"""Gemma 3, text: dense, most layers attend over a sliding window, every sixth over everything.

D: hidden, F: FFN columns. The two kinds of layer have RoPE of their own; norms multiply by 1 + weight and also follow
attention and FFN; embeddings are scaled by sqrt(D) and used again as the LM head. The window is the KV cache's
business: ``Arch.windows``. Names and maths are those of Hugging Face's ``Gemma3ForCausalLM``, of which
``Gemma3ForConditionalGeneration`` (images, not served here) holds a copy under another prefix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.arch import Arch
from toolkit.engine.layers import DenseFFN, Embedding, LMHead, RMSNorm, Rotary, gelu_tanh, rope_settings
from toolkit.engine.models.base import MODELS, Forward
from toolkit.engine.models.gqa import Attention, kv_spec
from toolkit.engine.moe.layer import MoEContext
from toolkit.engine.parallel import Groups
from toolkit.engine.weights import Weights

# prefix -> LM head, of Gemma3ForCausalLM; of Gemma3ForConditionalGeneration as released, and as transformers 5 saves it
PREFIXES = {
    "model": "lm_head",
    "language_model.model": "language_model.lm_head",
    "model.language_model": "lm_head",
}
IMAGES = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")


class Layer:
    """One decoder layer: attention, then FFN, each with a norm before and after it."""

    def __init__(self, weights: Weights, name: str, arch: Arch, groups: Groups, rotary: Rotary, layer: int) -> None:
        d, head_dim = arch.hidden_size, arch.kv_values // 2
        attention = f"{name}.self_attn"
        self.before_attention = _norm(weights, f"{name}.input_layernorm", arch, d)
        self.attention = Attention(
            weights, attention, arch, groups, rotary, layer, scale=arch.hf["query_pre_attn_scalar"] ** -0.5,
            norms=(
                _norm(weights, f"{attention}.q_norm", arch, head_dim),
                _norm(weights, f"{attention}.k_norm", arch, head_dim),
            ),
        )  # fmt: skip
        self.after_attention = _norm(weights, f"{name}.post_attention_layernorm", arch, d)
        self.before_ffn = _norm(weights, f"{name}.pre_feedforward_layernorm", arch, d)
        self.ffn = DenseFFN(weights, f"{name}.mlp", d, arch.dense_intermediate, groups.dense, gelu_tanh)
        self.after_ffn = _norm(weights, f"{name}.post_feedforward_layernorm", arch, d)

    def __call__(self, x_SD: Tensor, step: Forward) -> Tensor:
        x_SD = x_SD + self.after_attention(self.attention(self.before_attention(x_SD), step))
        return x_SD + self.after_ffn(self.ffn(self.before_ffn(x_SD), step.layout))


@MODELS.register("gemma3_text")
class Gemma3:
    def __init__(self, arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> None:
        d = arch.hidden_size
        prefix = next((p for p in PREFIXES if weights.has(f"{p}.embed_tokens.weight")), "model")
        for images in IMAGES:
            weights.skip(images, "images, which are not served")
        self.embed = Embedding(weights, f"{prefix}.embed_tokens", arch.vocab_size, d)
        # rounded to the weights' type, as the model was trained
        self.embed_scale = float(torch.tensor(math.sqrt(d)).to(self.embed.weight.dtype))
        rotary = {
            window: Rotary(arch.kv_values // 2, _rope(arch.hf, window), arch.max_len, device)
            for window in set(arch.windows)
        }
        self.layers = [
            Layer(weights, f"{prefix}.layers.{i}", arch, groups, rotary[window], i)
            for i, window in enumerate(arch.windows)
        ]
        self.norm = _norm(weights, f"{prefix}.norm", arch, d)
        tied = self.embed if arch.tied else None
        self.head = LMHead.load(weights, PREFIXES[prefix], arch.vocab_size, d, groups, tied)
        self.kv_spec = kv_spec(arch, groups.attn_tp)

    def forward(self, tokens_T: Tensor, step: Forward) -> Tensor:
        x = step.layout.scatter(self.embed(tokens_T) * self.embed_scale)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)

    def logits(self, hidden_ND: Tensor, dp_rows: tuple[int, ...]) -> Tensor:
        return self.head(hidden_ND, dp_rows)


def _norm(weights: Weights, name: str, arch: Arch, size: int) -> RMSNorm:
    return RMSNorm(weights, name, size, arch.hf["rms_norm_eps"], add_one=True)


def _rope(hf: dict[str, Any], window: int) -> dict[str, Any]:
    """RoPE settings of the sliding (``window`` > 0) or the global layers, from either style of config.json."""
    by_kind = hf.get("rope_parameters")
    if by_kind:
        return rope_settings({"rope_parameters": by_kind["sliding_attention" if window else "full_attention"]})
    if window:
        return rope_settings({"rope_theta": hf["rope_local_base_freq"]})
    return rope_settings(hf)
