"""Experts migrate on GPUs under load, inside CUDA graphs and steps launched ahead: texts, weights, addresses, counts.

Tiny random models, whose best tokens are often near each other. A text may go another way only there, since a row's
expert may now be on another GPU, whose part of the sum is rounded in another order; that nothing else differs is said
by the weights, compared bit by bit, and by the rows that slots received.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import run_ranks
from tests.gpu.migrating import Result, migrate_on_gpus
from tests.gpu.moe_layers import COMMON, dims
from tests.gpu.needs import needs_gpus, needs_library
from toolkit.config.engine import EngineConfig

TIMES = 3
MODEL = COMMON | {
    "model_type": "qwen3_moe", "num_experts": 16, "head_dim": 128, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "vocab_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 512,
}  # fmt: skip
FP8 = MODEL | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
# model, options
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2-bf16-static": (MODEL, {"deepep_buffer": "v2"}),
    "legacy-bf16-dynamic": (MODEL, {"deepep_buffer": "legacy", "ep_dispatch_algorithm": "dynamic"}),
    "v2-fp8-weighted": (FP8, {"deepep_buffer": "v2", "ep_dispatch_algorithm": "weighted"}),
    "legacy-fp8-static": (FP8, {"deepep_buffer": "legacy", "eplb_rebalance_layers_per_chunk": 1}),
    "v2-bf16-weighted-eager": (
        MODEL, {"deepep_buffer": "v2", "ep_dispatch_algorithm": "weighted", "disable_cuda_graph": True},
    ),
}  # fmt: skip


def engine(**options: Any) -> EngineConfig:
    return EngineConfig(**{
        "page_size": 64, "max_total_tokens": 4096, "max_running_requests": 8, "chunked_prefill_size": 128,
        "context_length": 256, "enable_eplb": True, "ep_num_redundant_experts": 8, "moe_a2a_backend": "deepep",
        "expert_distribution_recorder_mode": "stat", "expert_distribution_recorder_window": 5,
        "eplb_rebalance_num_iterations": 10**9,
    } | options)  # fmt: skip


def check(ranks: list[Result], graphs: bool, rebalances: int = TIMES, aborted: int = 0) -> None:
    for rank in ranks:
        assert not rank.wrong, rank.wrong
        assert (rank.rebalances, rank.aborted) == (rebalances, aborted)
        assert rank.placements == ranks[0].placements, "ranks disagree"
        assert rank.addresses_kept and rank.weights_right and rank.cleanly_counted
        assert bool(rank.graphs) == graphs
        assert rank.moving_steps > 0, "no step ran while experts moved"
        assert rank.compared > 2 * rank.tipped, f"{rank.compared} tokens compared, {rank.tipped} texts tipped over"


@needs_gpus(1)
@pytest.mark.parametrize("algorithm", ["static", "dynamic", "weighted"])
def test_slots_of_one_gpu_change_places(tmp_path: Path, algorithm: str) -> None:
    """Copies alone; allgather sends nothing on one GPU."""
    options = engine(moe_a2a_backend="allgather", ep_dispatch_algorithm=algorithm)
    check(run_ranks(dims(1), migrate_on_gpus, MODEL, options, tmp_path, TIMES, device="cuda"), graphs=True)


@needs_gpus(2)
@needs_library("deep_ep")
@needs_library("deep_gemm")
@pytest.mark.parametrize("kind", KINDS)
def test_texts_stay_while_experts_move_between_gpus(tmp_path: Path, kind: str) -> None:
    model, options = KINDS[kind]
    ranks = run_ranks(dims(2), migrate_on_gpus, model, engine(**options), tmp_path, TIMES, device="cuda")
    check(ranks, graphs="eager" not in kind)
    assert all(rank.direct for rank in ranks), "GPUs of one host open each other's memory"


@needs_gpus(2)
@needs_library("deep_ep")
def test_by_nccl_where_gpus_do_not_open_each_other(tmp_path: Path) -> None:
    ranks = run_ranks(dims(2), migrate_on_gpus, MODEL, engine(), tmp_path, TIMES, None, False, device="cuda")
    check(ranks, graphs=True)
    assert not any(rank.direct for rank in ranks)


@needs_gpus(2)
@needs_library("deep_ep")
def test_a_rank_that_fails_in_the_middle_leaves_a_whole_placement(tmp_path: Path) -> None:
    options = engine(eplb_rebalance_layers_per_chunk=1)
    ranks = run_ranks(dims(2), migrate_on_gpus, MODEL, options, tmp_path, 1, (1, 2), device="cuda")
    check(ranks, graphs=True, rebalances=0, aborted=1)
    trivial = [slot % 16 for slot in range(24)]
    assert [row != trivial for row in ranks[0].placements[0]] == [True, True, False, False]
