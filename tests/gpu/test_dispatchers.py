"""The dispatchers' contract on 1, 2 and 4 GPUs: every backend, way, buffer and type, eagerly and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.contract.dispatch_cases import ROUTINGS, ROWS, Case, round_trips, rows_meet_their_experts
from tests.dist.ranks import run_ranks
from tests.gpu.dispatch_graphs import graph_follows_its_inputs, sums_go_on_to_the_norm
from tests.gpu.needs import SIZES, needs_gpus, needs_library
from toolkit.config.engine import EngineConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups

BF16 = (torch.bfloat16,)
FP8_TOLERANCE = {torch.bfloat16: 7e-2}  # half a step of e4m3's three bits of mantissa


def deepep(mode: str, buffer: str, dtype: str, overlap: bool = False) -> Case:
    engine = EngineConfig(
        deepep_mode=mode, deepep_buffer=buffer, deepep_dispatch_dtype=dtype, enable_two_batch_overlap=overlap
    )  # type: ignore[arg-type]
    extend = {"normal": (True, False), "low_latency": (True, False), "auto": (True, False)}[mode]
    return Case(
        "deepep", 128, "cuda", slots=16, hidden=2048, engine=engine, fp8=dtype == "fp8", is_extend=extend, dtypes=BF16,
        tolerance=FP8_TOLERANCE if dtype == "fp8" else {torch.bfloat16: 2e-2},
    )  # fmt: skip


CASES = {
    f"deepep-{mode}-{buffer}-{dtype}": deepep(mode, buffer, dtype)
    for mode in ("normal", "low_latency", "auto")
    for buffer in ("v2", "legacy")
    for dtype in ("bf16", "fp8")
} | {
    f"deepep-overlap-{buffer}": deepep("auto", buffer, "bf16", overlap=True) for buffer in ("v2", "legacy")
}  # fmt: skip
NVLINK = {
    dtype: Case(
        "nvlink", 128, "cuda", slots=16, hidden=2048, fp8=dtype == "fp8", is_extend=(True, False), dtypes=BF16,
        tolerance=FP8_TOLERANCE if dtype == "fp8" else {torch.bfloat16: 2e-2},
    )
    for dtype in ("bf16", "fp8")
} | {
    "deepseek": Case(
        "nvlink", 64, "cuda", slots=256, hidden=7168, top_k=8, fp8=True, dtypes=BF16, tolerance=FP8_TOLERANCE
    ),
}  # fmt: skip
NCCL = {
    name: Case(name, 128, "cuda", slots=16, hidden=2048, is_extend=(True, False))
    for name in ("allgather", "all_to_all")
}


def dims(ranks: int) -> ParallelDims:
    return ParallelDims.of(ParallelConfig(ranks, ranks, ranks, enable_dp_attention=True))


def whole_contract(groups: Groups, case: Case) -> list[int]:
    """Round trips, experts met, graph replays, in one go: starting ranks on GPUs takes longer than the cases."""
    done = [round_trips(groups, case), rows_meet_their_experts(groups, case)]
    captures = case.backend != "deepep" or case.engine.deepep_mode != "normal"
    return [*done, graph_follows_its_inputs(groups, case, rows=13) if captures else 0]


def expected(ranks: int, case: Case) -> list[int]:
    trips = len(case.dtypes) * len(ROWS[ranks]) * len(ROUTINGS) * len(case.is_extend)
    captures = case.backend != "deepep" or case.engine.deepep_mode != "normal"
    return [trips, len(case.is_extend), 5 if captures else 0]


@needs_gpus(1)
@pytest.mark.parametrize("name", NCCL)
@pytest.mark.parametrize("ranks", SIZES)
def test_nccl(name: str, ranks: int) -> None:
    assert run_ranks(dims(ranks), whole_contract, NCCL[name], device="cuda") == [expected(ranks, NCCL[name])] * ranks


@needs_library("deep_ep")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", SIZES[1:])
def test_deepep(name: str, ranks: int) -> None:
    assert run_ranks(dims(ranks), whole_contract, CASES[name], device="cuda") == [expected(ranks, CASES[name])] * ranks


def nvlink_contract(groups: Groups, case: Case) -> list[int]:
    return [*whole_contract(groups, case), sums_go_on_to_the_norm(groups, case)]


@needs_gpus(1)
@pytest.mark.parametrize("dtype", NVLINK)
@pytest.mark.parametrize("ranks", SIZES)
def test_nvlink(dtype: str, ranks: int) -> None:
    """The prefill steps of this case go by DeepEP, or by all-gather where it is not installed."""
    case = NVLINK[dtype]
    wanted = [*expected(ranks, case), len(ROWS[ranks])]
    assert run_ranks(dims(ranks), nvlink_contract, case, device="cuda") == [wanted] * ranks
