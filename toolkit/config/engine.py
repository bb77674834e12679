"""``engine.*``: the engine of every rank, in SGLang's words. What they must satisfy: ``launch/check.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolkit.config.options import opt


@dataclass(frozen=True)
class AttentionDpConfig:
    """Holding prefills back until DP ranks can run them in the same step (TensorRT-LLM's attention_dp_config)."""

    enable_balance: bool = opt(False, "hold new prompts until every DP rank has one, within the limits below")
    batching_wait_iters: int = opt(10, "steps to hold them when every rank has one and all are decoding")
    timeout_iters: int = opt(50, "steps to hold them when some rank has none")


@dataclass(frozen=True)
class EngineConfig:
    """The engine of every rank; SGLang's words."""

    backend: str = opt("native", "engine adapter: native")
    attention_backend: str = opt("auto", "auto, sdpa; on GPUs: triton, fa3, flash_mla (latent attention), varlen")
    moe_a2a_backend: str = opt("all_to_all", "allgather (SGLang: none), all_to_all; GPUs: deepep, nvlink (one host)")
    deepep_mode: Literal["auto", "normal", "low_latency"] = opt(
        "auto", "auto: low_latency for steps without prefill; normal waits for row counts, low_latency fits CUDA graphs"
    )
    deepep_buffer: Literal["auto", "v2", "legacy"] = opt("auto", "DeepEP's ElasticBuffer or Buffer; auto: the faster")
    deepep_dispatch_dtype: Literal["auto", "fp8", "bf16"] = opt("auto", "rows on their way to FP8 experts; auto: fp8")
    deepep_num_max_dispatch_tokens_per_rank: int = opt(
        0, "rows of a rank for which low_latency has room; 0: what a step without prefill may have"
    )
    moe_runner_backend: str = opt("auto", "expert GEMM: auto, torch, grouped_mm; on GPUs deep_gemm, triton")
    page_size: int = opt(16, "tokens a KV block")
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = opt(
        "auto", "auto: the model's; fp8_e4m3: half the bytes, for latent attention (DeepSeek)"
    )
    max_total_tokens: int = opt(8192, "KV cache capacity of one DP rank, tokens")
    mem_fraction_static: float = opt(
        0.0, "share of a GPU's memory that may be taken: after weights, buffers and graphs the KV cache gets the rest; "
        "0: max_total_tokens as given"
    )  # fmt: skip
    disable_cuda_graph: bool = opt(False, "GPUs: launch every kernel of a decode step, instead of one captured graph")
    cuda_graph_max_bs: int = opt(0, "GPUs: largest decode batch that is captured; 0: max_running_requests")
    disable_overlap_schedule: bool = opt(False, "GPUs: wait for each step's tokens before the next is prepared")
    swa_full_tokens_ratio: float = opt(
        0.0, "KV capacity of sliding-window layers as a share of max_total_tokens; 0: what max_running_requests need"
    )
    max_running_requests: int = opt(64, "requests in one DP rank's running batch")
    max_queued_requests: int = opt(4096, "requests a server holds before it answers 503")
    chunked_prefill_size: int = opt(512, "token budget of one DP rank's step; longer prompts are prefilled in chunks")
    context_length: int = opt(0, "longest prompt + output, tokens; 0: the model's")
    dp_padding_mode: Literal["auto", "max_len", "sum_len"] = opt(
        "auto", "rows of DP ranks in gathers: padded or packed"
    )
    enable_two_batch_overlap: bool = opt(False, "run two half batches, one's communication beside the other's compute")
    attention_dp_config: AttentionDpConfig = opt(AttentionDpConfig(), "when DP ranks start prefills together")
    disable_radix_cache: bool = opt(False, "turn prefix reuse off")
    ep_num_redundant_experts: int = opt(0, "expert replicas beyond one of each; slots = experts + redundant")
    init_expert_location: str = opt(
        "trivial", "where experts start: trivial, a .pt or .json file, or JSON (physical_to_logical_map, logical_count)"
    )
    ep_dispatch_algorithm: Literal["static", "dynamic", "weighted"] | None = opt(
        None, "replica a token goes to: static (nearest), dynamic (in turn), weighted (levels each batch); null: static"
    )
    enable_eplb: bool = opt(False, "move experts between ranks while serving, so that their load stays even")
    eplb_algorithm: Literal["auto", "global", "hierarchical", "spill"] = opt(
        "auto", "placements: global, hierarchical (a group's experts on one node), spill; auto: what nodes allow"
    )
    eplb_rebalance_num_iterations: int = opt(1000, "forward passes between two looks at the balance")
    eplb_rebalance_layers_per_chunk: int | None = opt(
        None, "layers moved at a time; null: as many as the spare buffers (one layer's slots) hold"
    )
    eplb_min_rebalancing_utilization_threshold: float = opt(
        1.0, "no rebalance while balancedness (mean / busiest rank) is above this; 1: always look for one"
    )
    eplb_transfer_budget: float = opt(
        0.05, "largest share of the slots that a rebalance moves; the first one, from a trivial placement, may move all"
    )
    expert_distribution_recorder_mode: Literal["stat", "stat_approx", "per_pass", "per_token"] | None = opt(
        "stat",
        "stat: counts by top-k ids, a window; stat_approx: by rows received; per_pass, per_token: each pass; null: off",
    )
    expert_distribution_recorder_window: int = opt(8, "forward passes a recorder window")
    expert_distribution_recorder_buffer_size: int = opt(256, "per_pass, per_token: passes kept for a dump, the newest")
    random_seed: int = opt(0, "seed for requests that bring none")
