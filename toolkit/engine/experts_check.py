"""Rules between experts, dispatchers and what their GPU libraries can do. No torch, so that plans are instant.

Called by ``arch_check.check``; sources of the limits: DeepEP's buffers/legacy.py, buffers/elastic.py and its compiled
shapes. Knows no libraries: whether they are installed is found where they are imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING

from toolkit.config.engine import EngineConfig
from toolkit.engine.dims import ParallelDims

if TYPE_CHECKING:
    from toolkit.engine.arch import Arch

MOST_TOP_K = 32
# the first buffer's compiled kernels
LEGACY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
LEGACY_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
LEGACY_TOP_K = 11
LEGACY_ROWS = 511  # NVSHMEM_QP_DEPTH (1024) holds two for each row, and two more
TILE = 128  # rows of DeepGEMM's tiles at most
DEFAULTS = EngineConfig()
USES_DEEPEP = ("deepep", "nvlink")  # which leaves steps with prefill to it


def check_experts(arch: Arch, dims: ParallelDims, engine: EngineConfig) -> list[str]:
    """Sentences: field, value, rule, way out."""
    if engine.moe_a2a_backend not in USES_DEEPEP:
        return [
            f"engine.{name}={getattr(engine, name)} is an option of engine.moe_a2a_backend=deepep and nvlink, but that "
            f"is {engine.moe_a2a_backend}: use deepep, or leave {name} at {getattr(DEFAULTS, name)}"
            for name in vars(DEFAULTS)
            if name.startswith("deepep_") and getattr(engine, name) != getattr(DEFAULTS, name)
        ]
    errors = list(_deepep(arch, dims, engine)) if arch.moe_layers else []
    return errors + (list(_legacy(arch, dims, engine)) if engine.deepep_buffer == "legacy" and arch.moe_layers else [])


def room(dims: ParallelDims, engine: EngineConfig) -> int:
    """Rows of a rank for which DeepEP's low-latency way has room."""
    budget = engine.max_running_requests if engine.deepep_mode != "low_latency" else engine.chunked_prefill_size
    return engine.deepep_num_max_dispatch_tokens_per_rank or -(-budget // dims.attn_tp)


def whole_tiles(rows: int, ranks: int, tile: int = TILE) -> int:
    """At least ``rows`` of a rank, so that those of all ``ranks`` fill tiles: a GEMM over slots stores whole ones."""
    unit = tile // gcd(tile, ranks)
    return -(-rows // unit) * unit


def _deepep(arch: Arch, dims: ParallelDims, engine: EngineConfig) -> Iterator[str]:
    backend = f"engine.moe_a2a_backend={engine.moe_a2a_backend}"
    if dims.ep_size == 1:
        yield (
            f"{backend} sends rows between EP ranks, but parallel.ep_size=1: use ep_size > 1, or "
            "moe_a2a_backend=allgather, which then sends nothing"
        )
    multiple = 128 if arch.fp8 and engine.deepep_dispatch_dtype != "bf16" else 8
    if arch.hidden_size % multiple:
        yield (
            f"{backend} moves rows of a multiple of {multiple} values, but hidden_size="
            f"{arch.hidden_size}: use moe_a2a_backend=all_to_all"
        )
    if arch.top_k > MOST_TOP_K:
        yield (
            f"{backend} takes up to {MOST_TOP_K} experts a token, the model has {arch.top_k}: use "
            "moe_a2a_backend=all_to_all"
        )
    if engine.deepep_dispatch_dtype == "fp8" and not arch.fp8:
        yield (
            "engine.deepep_dispatch_dtype=fp8 needs experts in FP8 (quantization_config of the checkpoint, blocks of "
            "128 x 128), these are not: use auto or bf16"
        )
    most = -(-engine.chunked_prefill_size // dims.attn_tp)
    if engine.deepep_num_max_dispatch_tokens_per_rank < 0:
        given = engine.deepep_num_max_dispatch_tokens_per_rank
        yield f"engine.deepep_num_max_dispatch_tokens_per_rank={given} must not be negative: use 0 to have it chosen"
    elif engine.deepep_mode == "low_latency" and room(dims, engine) < most:
        yield (
            f"engine.deepep_num_max_dispatch_tokens_per_rank={engine.deepep_num_max_dispatch_tokens_per_rank} has less "
            f"room than the {most} rows that a step may bring each rank (engine.chunked_prefill_size="
            f"{engine.chunked_prefill_size}), and engine.deepep_mode=low_latency has no other way: raise it to {most}, "
            "or use deepep_mode=auto"
        )


def _legacy(arch: Arch, dims: ParallelDims, engine: EngineConfig) -> Iterator[str]:
    way_out = "use engine.deepep_buffer=v2"
    if engine.deepep_mode != "low_latency" and dims.ep_size not in LEGACY_RANKS:
        yield (
            f"engine.deepep_buffer=legacy runs over {', '.join(map(str, LEGACY_RANKS))} ranks, not over "
            f"parallel.ep_size={dims.ep_size}: {way_out}"
        )
    if engine.deepep_mode == "normal":
        return
    if arch.hidden_size not in LEGACY_HIDDEN:
        yield (
            f"engine.deepep_buffer=legacy has low-latency kernels for hidden sizes {', '.join(map(str, LEGACY_HIDDEN))}"
            f", not for {arch.hidden_size}: {way_out} or deepep_mode=normal"
        )
    if arch.top_k > LEGACY_TOP_K:
        yield (
            f"engine.deepep_buffer=legacy takes up to {LEGACY_TOP_K} experts a token with low latency, the model has "
            f"{arch.top_k}: {way_out}"
        )
    unit = whole_tiles(1, dims.ep_size)
    if whole_tiles(room(dims, engine), dims.ep_size) > LEGACY_ROWS:
        most = LEGACY_ROWS // unit * unit
        yield (
            f"engine.deepep_buffer=legacy has room for {most} rows a rank with low latency, but a step may "
            f"bring {room(dims, engine)}: {way_out}, or set deepep_num_max_dispatch_tokens_per_rank <= {most} "
            "with deepep_mode=auto"
        )
