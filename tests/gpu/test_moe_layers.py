"""MoE layers of tiny random Qwen3-MoE and DeepSeek-V3 on GPUs against the CPU reference: backends, types, GPUs."""

from __future__ import annotations

import pytest

from tests.dist.ranks import run_ranks
from tests.gpu.moe_layers import Compared, dims
from tests.gpu.needs import SIZES, needs_gpus, needs_library
from toolkit.config.engine import EngineConfig
from toolkit.engine.parallel import Groups

# dispatcher, GEMM, FP8 experts; relative error: two roundings to bf16, or e4m3's 2^-4 spread over sums
KINDS = [
    ("allgather", "torch", False),
    ("all_to_all", "grouped_mm", False),
    ("allgather", "deep_gemm", False),
    ("all_to_all", "deep_gemm", True),
    ("deepep", "deep_gemm", False),
    ("deepep", "deep_gemm", True),
    ("nvlink", "deep_gemm", False),
    ("nvlink", "deep_gemm", True),
]
STEPS = [((21, 6), True), ((9, 4), False), ((0, 12), False), ((0, 17), True)]


def all_steps(groups: Groups, family: str, dispatcher: str, gemm: str, fp8: bool) -> list[float]:
    engine = EngineConfig(
        moe_a2a_backend=dispatcher, moe_runner_backend=gemm, max_running_requests=16, chunked_prefill_size=32
    )
    compared = Compared(groups, family, engine, fp8)
    return [compared.error(of_ranks(rows, groups.dims.tp_size), extend) for rows, extend in STEPS]


def of_ranks(rows: tuple[int, int], ranks: int) -> tuple[int, ...]:
    """The rows of two ranks, on one or dealt to four."""
    return {1: (sum(rows),), 2: rows, 4: (rows[1], rows[0], 0, rows[1] // 2)}[ranks]


@needs_gpus(1)
@needs_library("deep_gemm")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k[0]}-{k[1]}-{'fp8' if k[2] else 'bf16'}")
@pytest.mark.parametrize("ranks", SIZES)
def test_layers_equal_the_cpu(family: str, kind: tuple[str, str, bool], ranks: int) -> None:
    if kind[0] in ("deepep", "nvlink") and ranks == 1:
        pytest.skip("between GPUs")
    if kind[0] in ("allgather", "all_to_all") and ranks > 2:
        pytest.skip("no other than between two")
    errors = run_ranks(dims(ranks), all_steps, family, *kind, device="cuda")
    assert all(error < (8e-2 if kind[2] else 1.5e-2) for rank in errors for error in rank), errors
