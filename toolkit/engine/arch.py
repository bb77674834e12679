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
from toolkit.engine.dims import ParallelDims
from toolkit.engine.eplb.check import check_eplb
from toolkit.engine.experts_check import check_experts
from toolkit.engine.kv.kinds import layer_kinds, window_blocks
from toolkit.registry import unknown

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
FP8_BYTES = 1 + 4 / 128**2  # a value, and its share of a block's scale


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


def check(arch: Arch, dims: ParallelDims, engine: EngineConfig) -> list[str]:
    """Every way in which shapes, degrees and engine options do not fit together, as sentences. Empty: fine."""
    slots = arch.slots(engine)
    errors: list[str] = []

    def must_divide(field: str, degree: int, count: int, what: str, way_out: str) -> None:
        if count % degree:
            errors.append(f"{field}={degree} does not divide {count} {what}: {way_out}")

    if engine.ep_num_redundant_experts < 0:
        errors.append(f"engine.ep_num_redundant_experts={engine.ep_num_redundant_experts} must not be negative")
    if not arch.moe_layers:
        errors += _check_dense(arch, dims, engine)
    elif slots % dims.ep_size:
        more = engine.ep_num_redundant_experts + (-slots) % dims.ep_size
        errors.append(
            f"parallel.ep_size={dims.ep_size} does not divide {slots} slots (model.num_experts={arch.num_experts} + "
            f"engine.ep_num_redundant_experts={engine.ep_num_redundant_experts}): use {more} redundant experts "
            f"({arch.num_experts + more}) or ep_size={_largest_divisor(slots, dims.ep_size)}"
        )
    attn = "parallel.tp_size / parallel.dp_size"
    fits = [n for n in range(1, arch.num_heads + 1) if not arch.num_heads % n and _splits_kv_heads(arch, n)]
    fit = f"use attention TP of {', '.join(map(str, fits))} (raise dp_size)"
    must_divide(attn, dims.attn_tp, arch.num_heads, "attention heads", fit)
    if not _splits_kv_heads(arch, dims.attn_tp):
        errors.append(f"{attn}={dims.attn_tp} neither divides nor is a multiple of {arch.kv_heads} KV heads: {fit}")
    errors += _check_head(arch, dims, fits)
    if arch.moe_layers:
        field = "parallel.tp_size / parallel.ep_size / parallel.moe_dp_size"
        must_divide(field, dims.moe_tp, arch.moe_intermediate, "expert FFN columns", "raise ep_size")
    if len(arch.moe_layers) < arch.num_layers:
        way = "use parallel.moe_dense_tp_size=1"
        must_divide("parallel.tp_size", dims.dense_tp, arch.dense_intermediate, "dense FFN columns", way)
    if arch.moe_layers and engine.moe_a2a_backend != "allgather" and dims.moe_tp > 1:
        errors.append(
            f"engine.moe_a2a_backend={engine.moe_a2a_backend} needs whole experts, but each is split over "
            f"{dims.moe_tp} ranks: use ep_size={dims.moe_group} or moe_a2a_backend=allgather"
        )
    if engine.enable_two_batch_overlap and not arch.moe_layers:
        errors.append(
            f"engine.enable_two_batch_overlap=true has nothing to overlap in {arch.family}, a model without experts: "
            "use false"
        )
    elif engine.enable_two_batch_overlap and (engine.moe_a2a_backend in ("allgather", "nvlink") or dims.ep_size == 1):
        errors.append(
            f"engine.enable_two_batch_overlap=true needs dispatches that travel beside compute, but "
            f"moe_a2a_backend={engine.moe_a2a_backend} with ep_size={dims.ep_size} has none: use all_to_all or "
            "deepep, and ep_size > 1, or enable_two_batch_overlap=false"
        )
    return (
        errors
        + check_eplb(engine, arch, dims.ep_size)
        + check_experts(arch, dims, engine)
        + _check_engine(arch, engine)
    )


def _check_head(arch: Arch, dims: ParallelDims, fits: list[int]) -> list[str]:
    """The vocabulary must divide by the ranks of the LM head; ``fits``: attention TPs that the heads allow."""
    if not arch.vocab_size % dims.head_tp:
        return []
    field = "parallel.tp_size / parallel.dp_size" if dims.enable_dp_lm_head else "parallel.tp_size"
    ways = [n for n in fits if not arch.vocab_size % n]
    way_out = f"use attention TP of {', '.join(map(str, ways))} (raise dp_size), with parallel.enable_dp_lm_head=true"
    return [f"{field}={dims.head_tp} does not divide {arch.vocab_size} vocabulary rows: {way_out}"]


def _check_dense(arch: Arch, dims: ParallelDims, engine: EngineConfig) -> list[str]:
    """Options for experts, which a model without them would ignore."""
    given = {
        "parallel.ep_size": (dims.ep_size, 1),
        "parallel.moe_dp_size": (dims.moe_dp_size, 1),
        "engine.ep_num_redundant_experts": (engine.ep_num_redundant_experts, 0),
    }
    return [
        f"{field}={value} needs experts, but {arch.family} has none: use {neutral}"
        for field, (value, neutral) in given.items()
        if value != neutral
    ]


def _check_engine(arch: Arch, engine: EngineConfig) -> list[str]:
    errors = [
        f"engine.{name}={getattr(engine, name)} must be at least 1"
        for name in ("page_size", "max_running_requests", "chunked_prefill_size", "max_queued_requests",
                     "expert_distribution_recorder_window")
        if getattr(engine, name) < 1
    ]  # fmt: skip
    if engine.max_total_tokens < 2 * engine.page_size:
        errors.append(
            f"engine.max_total_tokens={engine.max_total_tokens} holds fewer than two blocks of "
            f"engine.page_size={engine.page_size}: use at least {2 * engine.page_size}"
        )
    if not 0 <= engine.mem_fraction_static < 1:
        errors.append(
            f"engine.mem_fraction_static={engine.mem_fraction_static} must be at least 0 and below 1: use 0.85 to give "
            "weights, buffers, graphs and KV cache 85 % of a GPU, or 0 to have max_total_tokens as given"
        )
    if engine.cuda_graph_max_bs < 0:
        errors.append(f"engine.cuda_graph_max_bs={engine.cuda_graph_max_bs} must not be negative: use 0 for all")
    if engine.kv_cache_dtype != "auto" and not arch.mla:
        errors.append(
            f"engine.kv_cache_dtype={engine.kv_cache_dtype} is for latent attention, which {arch.family} has not: use "
            "auto"
        )
    errors += _check_windows(arch, engine)
    if engine.context_length < 0 or engine.context_length > arch.max_len:
        errors.append(
            f"engine.context_length={engine.context_length} must be within the model's {arch.max_len} "
            "(max_position_embeddings), or 0 for all of it"
        )
    if engine.chunked_prefill_size < engine.max_running_requests:
        errors.append(
            f"engine.chunked_prefill_size={engine.chunked_prefill_size} is the token budget of a step and must hold "
            f"one token of each of engine.max_running_requests={engine.max_running_requests}: raise it, or lower that"
        )
    return errors


def _check_windows(arch: Arch, engine: EngineConfig) -> list[str]:
    """A share of the KV cache for sliding layers that is none, or less than one request needs."""
    share, page = engine.swa_full_tokens_ratio, engine.page_size
    if not 0 <= share <= 1:
        return [f"engine.swa_full_tokens_ratio={share} must be within 0 and 1: use 0 to have it chosen"]
    if share and not any(arch.windows):
        return [f"engine.swa_full_tokens_ratio={share} needs sliding layers, but {arch.family} has none: use 0"]
    total = engine.max_total_tokens // max(page, 1)
    if not share or not total:
        return []
    needed = min(total, max(window_blocks(window, page) if window else 1 for window in arch.windows))
    if int(total * share) >= needed:
        return []
    sentence = (
        f"engine.swa_full_tokens_ratio={share} leaves sliding layers {int(total * share)} of {total} blocks, but one "
        f"request's window needs {needed}: use at least {needed / total:.3g}, or 0 to have it chosen"
    )
    return [sentence]


def context_length(arch: Arch, engine: EngineConfig) -> int:
    """Longest prompt + output of one request: the model's limit, the option, and what the KV cache can hold."""
    capacity = engine.max_total_tokens // engine.page_size * engine.page_size
    return min(engine.context_length or arch.max_len, capacity)


def wants_fp8(arch: Arch, engine: EngineConfig, device: str) -> bool:
    """True when matrices that are stored in FP8 are to be multiplied in it: on a GPU, by DeepGEMM."""
    return arch.fp8 and device != "cpu" and engine.moe_runner_backend in ("auto", "deep_gemm")


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


def _splits_kv_heads(arch: Arch, attn_tp: int) -> bool:
    """True when each rank gets whole KV heads, or each KV head a whole number of ranks."""
    return arch.mla or not (arch.kv_heads % attn_tp and attn_tp % arch.kv_heads)


def _largest_divisor(n: int, at_most: int) -> int:
    return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)
