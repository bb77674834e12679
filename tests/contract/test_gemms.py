"""The contract of every ExpertGemm that runs on a CPU; tests/gpu holds the others to it."""

from __future__ import annotations

import pytest
import torch

from tests.contract.gemm_cases import COUNTS, Case, equals_a_float32_loop, loop, weights
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import GEMMS, TorchGemm, make_gemm

BACKENDS = ["torch", "grouped_mm"]
GPU_BACKENDS = ["deep_gemm", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("layout", "weighted"), [("contiguous", False), ("contiguous", True), ("masked", False)])
@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_equals_a_float32_loop(backend: str, counts: tuple[int, ...], layout: str, rows: str, weighted: bool) -> None:
    equals_a_float32_loop(Case(backend, layout, rows, weighted), counts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("layout", "weighted"), [("contiguous", True), ("masked", False)])
def test_torch_in_a_cuda_graph_gives_the_same(layout: str, weighted: bool) -> None:
    """What runs while a graph is captured: no row counts are read."""

    class Captured(TorchGemm):
        def __call__(self, rows: Dispatched) -> torch.Tensor:
            return self._without_waiting(rows, rows.x)

    case = Case("torch", layout, "float32", weighted)  # type: ignore[arg-type]
    for counts in COUNTS:
        equals_a_float32_loop(case, counts, Captured())


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
@pytest.mark.parametrize("rows", ["fp8", "fp8_rows"])
def test_torch_multiplies_fp8_as_bfloat16(layout: str, rows: str) -> None:
    case = Case("torch", layout, rows, hidden=256, ffn=128)  # type: ignore[arg-type]
    equals_a_float32_loop(case, COUNTS[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pack_again_takes_new_weights(backend: str) -> None:
    gemm, case = make_gemm(backend), Case(backend, "contiguous", "float32")
    x = torch.randn(2, case.hidden)
    counts, ends = torch.tensor([2, 0, 0, 0]), torch.tensor([2, 2, 2, 2])
    rows = Dispatched("contiguous", x, None, counts, ends, None, 1, 2)
    for seed in (1, 2):
        w = weights(case, seed=seed)
        gemm.pack(w)
        torch.testing.assert_close(gemm(rows), loop(x, w, 0), rtol=1e-5, atol=1e-5)


def test_the_suite_runs_over_every_backend() -> None:
    make_gemm("torch")  # registers them
    assert sorted(GEMMS) == sorted(BACKENDS + GPU_BACKENDS)


def test_deep_gemm_without_its_library_names_the_extra() -> None:
    with pytest.raises(ValueError, match=r"engine.moe_runner_backend=deep_gemm needs .*toolkit\[gpu\]"):
        make_gemm("deep_gemm")
