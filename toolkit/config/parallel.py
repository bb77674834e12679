"""``parallel.*``: degrees of one worker. What they must satisfy: ``engine/dims.py``."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config.options import opt


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of one worker. tp_size = attn_tp * dp_size = moe_tp * ep_size * moe_dp_size."""

    tp_size: int = opt(1, "ranks of one worker: the size of the cooperating group, not of a weight split")
    dp_size: int = opt(1, "attention data-parallel groups; attn_tp = tp_size / dp_size")
    ep_size: int = opt(1, "expert-parallel ranks; moe_tp = tp_size / ep_size / moe_dp_size")
    moe_dp_size: int = opt(1, "replicas of the whole expert set inside one worker")
    moe_dense_tp_size: int | None = opt(None, "dense FFN and shared expert: null: split over tp_size, 1: replicated")
    enable_dp_lm_head: bool = opt(False, "split the vocabulary over attn_tp only, not over tp_size: no gather over DP")
    enable_dp_attention: bool = opt(False, "needed for dp_size > 1: each DP group has its own requests and KV cache")
