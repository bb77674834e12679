"""Families: from a Hugging Face config.json to an ``Arch``, one function a model_type. No torch.

Owns which keys a family has, their defaults, and the settings it refuses because ``models/`` does not compute them.
Read next: ``arch.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolkit.engine.arch import Arch


def mixtral(hf: dict[str, Any]) -> Arch:
    _only(hf, hidden_act="silu")
    return Arch(
        family="mixtral", hf=hf, vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"], max_len=hf["max_position_embeddings"], **_gqa(hf),
        windows=(hf.get("sliding_window") or 0,) * hf["num_hidden_layers"],
        moe_layers=tuple(range(hf["num_hidden_layers"])),
        num_experts=hf["num_local_experts"], top_k=hf["num_experts_per_tok"],
        moe_intermediate=hf["intermediate_size"], dense_intermediate=0, shared_intermediate=0,
        tied=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def qwen3_moe(hf: dict[str, Any]) -> Arch:
    _only(hf, hidden_act="silu", attention_bias=False)
    layers, every = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or ()
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else 0
    return Arch(
        family="qwen3_moe", hf=hf, vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"],
        num_layers=layers, max_len=hf["max_position_embeddings"], **_gqa(hf), windows=(window or 0,) * layers,
        moe_layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0),
        num_experts=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"], moe_intermediate=hf["moe_intermediate_size"],
        dense_intermediate=hf.get("intermediate_size") or 0, shared_intermediate=0,
        tied=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def deepseek_v3(hf: dict[str, Any]) -> Arch:
    _only(hf, hidden_act="silu", attention_bias=False, topk_method="noaux_tc", scoring_func="sigmoid")
    d, heads = hf["hidden_size"], hf["num_attention_heads"]
    nope, rope, v = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    lora, q_lora = hf["kv_lora_rank"], hf.get("q_lora_rank")
    by_heads = (q_lora or d) * heads * (nope + rope) + lora * heads * (nope + v) + heads * v * d
    attn = (by_heads, 0, d * (q_lora or 0) + d * (lora + rope))
    dense, every = hf["first_k_dense_replace"], hf.get("moe_layer_freq", 1)
    return Arch(
        family="deepseek_v3", hf=hf, vocab_size=hf["vocab_size"], hidden_size=d, num_layers=hf["num_hidden_layers"],
        num_heads=heads, kv_heads=1, kv_values=lora + rope, attn_params=attn, max_len=hf["max_position_embeddings"],
        windows=(0,) * hf["num_hidden_layers"],
        moe_layers=tuple(i for i in range(hf["num_hidden_layers"]) if i >= dense and i % every == 0),
        num_experts=hf["n_routed_experts"], top_k=hf["num_experts_per_tok"],
        moe_intermediate=hf["moe_intermediate_size"], dense_intermediate=hf["intermediate_size"],
        shared_intermediate=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
        tied=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


# What released Gemma 3 configs leave out, because it is the default of Hugging Face's Gemma3TextConfig.
GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": True,
}  # fmt: skip


def gemma3(hf: dict[str, Any]) -> Arch:
    """Text only: a multimodal config's ``text_config``, or the config of a text model."""
    hf = GEMMA3_DEFAULTS | hf.get("text_config", hf)
    _only(hf, hidden_activation="gelu_pytorch_tanh", attention_bias=False, attn_logit_softcapping=None,
          final_logit_softcapping=None, use_bidirectional_attention=False)  # fmt: skip
    layers, every = hf["num_hidden_layers"], hf["sliding_window_pattern"]
    kinds = hf.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    return Arch(
        family="gemma3_text", hf=hf, vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"],
        num_layers=layers, max_len=hf["max_position_embeddings"], **_gqa(hf),
        windows=tuple((hf["sliding_window"] or 0) if kind == "sliding_attention" else 0 for kind in kinds),
        moe_layers=(), num_experts=0, top_k=0, moe_intermediate=0,
        dense_intermediate=hf["intermediate_size"], shared_intermediate=0, tied=hf["tie_word_embeddings"],
    )  # fmt: skip


FAMILIES: dict[str, Callable[[dict[str, Any]], Arch]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gemma3_text": gemma3,
    "gemma3": gemma3,
}


def _gqa(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``Arch`` that grouped-query attention decides."""
    d, heads = hf["hidden_size"], hf["num_attention_heads"]
    kv, head_dim = hf["num_key_value_heads"], hf.get("head_dim") or d // heads
    params = (2 * d * head_dim * heads, 2 * d * head_dim * kv, 0)
    return {"num_heads": heads, "kv_heads": kv, "kv_values": 2 * head_dim, "attn_params": params}


def _only(hf: dict[str, Any], **supported: Any) -> None:
    """Refuses a config that sets one of ``supported`` to another value."""
    for key, value in supported.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{key}={hf[key]!r} is not supported: this engine computes {key}={value!r} only")
