"""Bytes that a rank needs, by kind: computed from shapes and degrees, before anything is allocated.

Activations and communication buffers are not in it. Read next: ``prepare.py``, which measures what a GPU has left.
"""

from __future__ import annotations

from toolkit.config.engine import EngineConfig
from toolkit.engine.arch import Arch, wants_fp8
from toolkit.engine.dims import ParallelDims
from toolkit.engine.kv.kinds import layer_kinds

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
FP8_BYTES = 1 + 4 / 128**2  # a value, and its share of a block's scale


def kv_value_bytes(engine: EngineConfig, dtype: str) -> int:
    """Bytes of one value in the KV cache."""
    return 1 if engine.kv_cache_dtype == "fp8_e4m3" else DTYPE_BYTES[dtype]


def memory_by_kind(
    arch: Arch, dims: ParallelDims, engine: EngineConfig, dtype: str, device: str = "cpu"
) -> dict[str, int]:
    """Bytes one rank needs, by kind. Activations and communication buffers are not in it."""
    size, d = DTYPE_BYTES[dtype], arch.hidden_size
    matrix = FP8_BYTES if wants_fp8(arch, engine, device) else size
    dense_layers = arch.num_layers - len(arch.moe_layers)
    expert = 3 * d * arch.moe_intermediate // dims.moe_tp
    embedding = arch.vocab_size * d
    by_heads, by_kv, replicated = arch.attn_params
    kv_shards = 1 if arch.mla else min(dims.attn_tp, arch.kv_heads)
    spare = 0 if device == "cpu" else 1  # a block of each pool, for the padding of steps with a fixed shape
    kinds = layer_kinds(arch.windows, engine)
    kv_rows = sum(len(kind.layers) * (kind.num_blocks + spare) * engine.page_size for kind in kinds)
    return {
        "embedding": size * (embedding if arch.tied and dims.head_tp == 1 else embedding + embedding // dims.head_tp),
        "attention": int(
            arch.num_layers
            * (
                (matrix if arch.mla else size) * (by_heads // dims.attn_tp + by_kv // kv_shards + replicated)
                + (size - matrix) * _latent_up(arch) // dims.attn_tp
            )
        ),
        "dense_ffn": int(matrix * dense_layers * 3 * d * arch.dense_intermediate // dims.dense_tp),
        "shared_experts": int(matrix * len(arch.moe_layers) * 3 * d * arch.shared_intermediate),
        "experts": int(matrix * len(arch.moe_layers) * arch.slots(engine) // dims.ep_size * expert),
        "eplb_spare": int(matrix * arch.slots(engine) // dims.ep_size * expert) if engine.enable_eplb else 0,
        "kv_cache": kv_value_bytes(engine, dtype) * kv_rows * arch.kv_values * arch.kv_heads // kv_shards,
    }


def _latent_up(arch: Arch) -> int:
    """Parameters of MLA's expansion of the latent, which einsums use: never in FP8."""
    hf = arch.hf
    return arch.num_heads * (hf["qk_nope_head_dim"] + hf["v_head_dim"]) * hf["kv_lora_rank"] if arch.mla else 0
