"""Arch: a model's shape, read from its Hugging Face config.json. No torch, so that plans and checks are instant.

Owns what every family has in common (sizes, which layers are MoE, bytes a token) and the rules between shapes
and degrees. Which keys a family has is in ``families.py``; what it computes is in ``models/``, one file each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.registry import unknown


@dataclass(frozen=True)
class Arch:
    """Shape of one model.

    Attributes:
        kv_heads: KV heads, 1 for MLA (one latent vector for all heads).
        kv_values: cached values a token, layer and KV head: 2 * head_dim, or kv_lora_rank + qk_rope_head_dim for MLA.
        windows: of each layer, the tokens that attention sees, its own included; 0: all.
        attn_params: attention parameters of one layer, (split by heads, split by KV heads, replicated).
        moe_layers: indices of the layers whose FFN is a mixture of experts; the others are dense.
    """

    family: str
    hf: dict[str, Any]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    kv_values: int
    attn_params: tuple[int, int, int]
    max_len: int
    windows: tuple[int, ...]
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    moe_intermediate: int
    dense_intermediate: int
    shared_intermediate: int
    tied: bool

    @property
    def mla(self) -> bool:
        return "kv_lora_rank" in self.hf

    @property
    def fp8(self) -> bool:
        """True when the checkpoint holds its matrices in FP8, in blocks that GEMMs on FP8 can use."""
        config = self.hf.get("quantization_config") or {}
        return config.get("quant_method") == "fp8" and list(config.get("weight_block_size", ())) == [128, 128]

    @property
    def expert_groups(self) -> int:
        """Groups that the gate chooses experts by (consecutive experts form one); 1: it knows none."""
        return int(self.hf.get("n_group") or 1)

    def slots(self, engine: EngineConfig) -> int:
        """Physical experts a layer."""
        return self.num_experts + engine.ep_num_redundant_experts


def read_arch(model: ModelConfig) -> Arch:
    """The shape of ``model``, from ``model.hf_config`` or ``model.path``/config.json.

    Raises:
        ValueError: no config, a family or a setting of it that is not supported, or a key that the family lacks.
    """
    if model.hf_config is not None:
        hf, where = model.hf_config, "model.hf_config"
    else:
        file = Path(model.path) / "config.json"
        if not model.path or not file.is_file():
            raise ValueError(
                f"model.path={model.path or repr('')} has no config.json: give a Hugging Face folder, "
                "or model.hf_config with model.load_format=dummy"
            )
        hf, where = json.loads(file.read_text()), str(file)
    from toolkit.engine.families import FAMILIES  # each builds an Arch

    family = str(hf.get("model_type", ""))
    if family not in FAMILIES:
        raise ValueError(unknown(f"{where}: model_type", family, list(FAMILIES)))
    try:
        _check_quantization(hf)
        return FAMILIES[family](hf)
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}, which model_type={family} needs") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_quantization(hf: dict[str, Any]) -> None:
    """Refuses checkpoints in a number format that ``weights.py`` cannot read."""
    config = hf.get("quantization_config")
    if config and (config.get("quant_method") != "fp8" or len(config.get("weight_block_size") or ()) != 2):
        raise ValueError(
            f"quantization_config.quant_method={config.get('quant_method')} with "
            f"weight_block_size={config.get('weight_block_size')} is not supported: use a checkpoint in bf16, or in "
            "fp8 with blocks, as DeepSeek releases it"
        )


def context_length(arch: Arch, engine: EngineConfig) -> int:
    """Longest prompt + output of one request: the model's limit, the option, and what the KV cache can hold."""
    capacity = engine.max_total_tokens // engine.page_size * engine.page_size
    return min(engine.context_length or arch.max_len, capacity)


def wants_fp8(arch: Arch, engine: EngineConfig, device: str) -> bool:
    """True when matrices that are stored in FP8 are to be multiplied in it: on a GPU, by DeepGEMM."""
    return arch.fp8 and device != "cpu" and engine.moe_runner_backend in ("auto", "deep_gemm")
