"""The rules between a model's shapes, the degrees and the engine's options.

Each broken rule is a sentence: field, value, rule and way out. Rules of experts' backends are in ``experts_check.py``,
of balancing in ``eplb/check.py``, of a deployment in ``launch/check.py``. Read next: ``dims.py``.
"""

from __future__ import annotations

from toolkit.config.engine import EngineConfig
from toolkit.engine.arch import Arch
from toolkit.engine.dims import ParallelDims
from toolkit.engine.eplb.check import check_eplb
from toolkit.engine.experts_check import check_experts
from toolkit.engine.kv.kinds import window_blocks


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


def _splits_kv_heads(arch: Arch, attn_tp: int) -> bool:
    """True when each rank gets whole KV heads, or each KV head a whole number of ranks."""
    return arch.mla or not (arch.kv_heads % attn_tp and attn_tp % arch.kv_heads)


def _largest_divisor(n: int, at_most: int) -> int:
    return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)
