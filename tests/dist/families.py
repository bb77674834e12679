"""A tiny random model of each family, made and computed by transformers: the oracle of the maths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.dist.cases import LENGTH, VOCAB, Case
from toolkit.config.model import ModelConfig


def mixtral() -> torch.nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def mixtral_sliding() -> torch.nn.Module:
    """All layers see a window of 7 tokens: no layer keeps every token."""
    config = mixtral().config
    config.sliding_window = 7
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> torch.nn.Module:
    """Every second layer is a mixture of experts; heads are wider than hidden / heads."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=12, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, decoder_sparse_step=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3() -> torch.nn.Module:
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=128,
        rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "beta_fast": 32,
                      "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def gemma3() -> torch.nn.Module:
    """Five sliding layers, a global one, a sliding one; windows of 6 tokens."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=12, sliding_window=6, max_position_embeddings=128,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                         "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0}},
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


FAMILIES = {
    "mixtral": mixtral,
    "mixtral-sliding": mixtral_sliding,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gemma3_text": gemma3,
}


def randomize(oracle: torch.nn.Module) -> None:
    """Weights large enough that every part of the model matters."""
    torch.manual_seed(0)
    for name, parameter in oracle.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.2)
    for name, buffer in oracle.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.2)


def make_case(family: str, folder: Path, length: int = LENGTH, count: int = 5) -> Case:
    """Saves a random model of ``family`` into ``folder``, and scores ``count`` sequences."""
    oracle = FAMILIES[family]().float().eval()
    randomize(oracle)
    oracle.save_pretrained(folder)
    return Case(ModelConfig(path=str(folder), dtype="float32"), *score(oracle, length, count))


def score(oracle: torch.nn.Module, length: int, count: int) -> tuple[list[list[int]], np.ndarray]:
    """Random sequences, of which the second and the last begin alike, and the logits of all positions but the last."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(VOCAB, (length,), generator=generator).tolist() for _ in range(count)]
    sequences[-1] = sequences[1][: length // 2] + sequences[-1][length // 2 :]
    with torch.no_grad():
        return sequences, oracle(torch.tensor(sequences)).logits[:, :-1].numpy()
