"""Small random models in shapes that GPU kernels take: heads of 128, latents of 512 + 64, experts of 128 columns."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.dist.cases import Case
from tests.dist.families import randomize, score
from toolkit.config.model import ModelConfig

VOCAB = 512


def qwen3_moe() -> torch.nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=True, decoder_sparse_step=1, max_position_embeddings=512,
    ))  # fmt: skip


def mixtral_sliding() -> torch.nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_local_experts=8, num_experts_per_tok=2, sliding_window=40,
        max_position_embeddings=512,
    ))  # fmt: skip


def deepseek_v3() -> torch.nn.Module:
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=512,
    ))  # fmt: skip


def gemma3() -> torch.nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=128, sliding_window=40, max_position_embeddings=512,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                         "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0}},
    ))  # fmt: skip


FAMILIES = {"qwen3_moe": qwen3_moe, "mixtral-sliding": mixtral_sliding, "deepseek_v3": deepseek_v3, "gemma3": gemma3}


def make_case(family: str, folder: Path, length: int = 90, count: int = 5) -> Case:
    """Saves a random model of ``family`` and scores sequences with transformers on the CPU, in float32."""
    oracle = FAMILIES[family]().float().eval()
    randomize(oracle)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(0.3)  # wide layers: keep logits in the range of a trained model's
    oracle.save_pretrained(folder)
    return Case(ModelConfig(path=str(folder), dtype="float32"), *score(oracle, length, count))
