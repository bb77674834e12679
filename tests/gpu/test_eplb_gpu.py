"""Experts migrate on GPUs under load, inside CUDA graphs and steps launched ahead: logits, weights, addresses, counts.

Experts and tokens of the random models are forced, so that no near tie can make one run another than the next: the
logits of every position, before, while and after experts move, differ by the rounding of sums in another order alone.
Each run ends with a map that is made wrong, whose logits must be far beyond what is allowed. Weights are compared bit
by bit. Of one rebalance each, nothing the host does in it may wait for a step under way.
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
ROUNDING = {"bf16": 0.04, "fp8": 0.1}  # largest relative error of a position's logits
# Dispatcher, dtype and choice of replicas, and what else is not the default.
KINDS: dict[str, dict[str, Any]] = {
    "v2-bf16-static": {},
    "legacy-bf16-dynamic": {},
    "nvlink-bf16-weighted": {},
    "v2-bf16-weighted-eager": {"disable_cuda_graph": True},
    "v2-fp8-weighted": {},
    "legacy-fp8-static": {"eplb_rebalance_layers_per_chunk": 1},
    "nvlink-fp8-dynamic": {},
}
DISPATCHERS: dict[str, dict[str, Any]] = {
    "one": {"moe_a2a_backend": "allgather"},
    "v2": {"moe_a2a_backend": "deepep", "deepep_buffer": "v2"},
    "legacy": {"moe_a2a_backend": "deepep", "deepep_buffer": "legacy"},
    "nvlink": {"moe_a2a_backend": "nvlink"},
}


def moved(ranks: int, kind: str, folder: Path, sabotage: int | None = None, direct: bool = True) -> list[Result]:
    """Three random placements; with ``sabotage`` a fourth, of a layer a chunk, that fails at this chunk."""
    dispatcher, dtype, algorithm = kind.split("-")[:3]
    options = DISPATCHERS[dispatcher] | {"ep_dispatch_algorithm": algorithm} | KINDS.get(kind, {})
    if sabotage is not None:
        options["eplb_rebalance_layers_per_chunk"] = 1
    engine = EngineConfig(**{
        "page_size": 64, "max_total_tokens": 4096, "max_running_requests": 8, "chunked_prefill_size": 128,
        "context_length": 256, "enable_eplb": True, "ep_num_redundant_experts": 8,
        "expert_distribution_recorder_mode": "stat", "expert_distribution_recorder_window": 5,
        "eplb_rebalance_num_iterations": 10**9,
    } | options)  # fmt: skip
    model = FP8 if dtype == "fp8" else MODEL
    found = run_ranks(dims(ranks), migrate_on_gpus, model, engine, folder, TIMES, sabotage, direct, device="cuda")
    for rank in found:
        what = f"{kind}: error {rank.error:.4f}, of a wrong map {rank.error_of_a_wrong_map:.3f}"
        print(what)
        assert rank.placements == found[0].placements, "ranks disagree"
        assert rank.addresses_kept and rank.weights_right and rank.cleanly_counted
        assert bool(rank.graphs) != engine.disable_cuda_graph
        assert rank.moving_steps > 0, "no step ran while experts moved"
        assert rank.watched and not rank.waited, f"{rank.waited} of {rank.watched} waited for the step under way"
        assert rank.error < ROUNDING[dtype] < rank.error_of_a_wrong_map / 2, what
        assert (rank.rebalances, rank.aborted) == (TIMES, int(sabotage is not None))
        if sabotage is not None:  # what all had committed stays, the rest is dropped everywhere
            before, after = rank.placements[-2:]
            assert [a != b for a, b in zip(before, after)] == [layer < sabotage for layer in range(4)]
    return found


@needs_gpus(1)
@pytest.mark.parametrize("algorithm", ["static", "dynamic", "weighted"])
def test_slots_of_one_gpu_change_places(tmp_path: Path, algorithm: str) -> None:
    """Copies alone; allgather sends nothing on one GPU."""
    moved(1, f"one-bf16-{algorithm}", tmp_path)


@needs_gpus(2)
@needs_library("deep_ep")
@needs_library("deep_gemm")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_while_experts_move_between_two_gpus(tmp_path: Path, kind: str) -> None:
    """In the first kind a rank fails in the middle of one more rebalance."""
    ranks = moved(2, kind, tmp_path, sabotage=1 if kind == "v2-bf16-static" else None)
    assert all(rank.direct for rank in ranks), "GPUs of one host open each other's memory"


@needs_gpus(2)
@needs_library("deep_ep")
def test_by_nccl_where_gpus_do_not_open_each_other(tmp_path: Path) -> None:
    assert not any(rank.direct for rank in moved(2, "v2-bf16-static", tmp_path, direct=False))


@needs_gpus(4)
@needs_library("deep_ep")
@needs_library("deep_gemm")
@pytest.mark.parametrize("kind", ["v2-fp8-weighted", "nvlink-bf16-static"])
def test_four_gpus_and_a_rank_that_fails_in_the_middle(tmp_path: Path, kind: str) -> None:
    moved(4, kind, tmp_path, sabotage=1)
