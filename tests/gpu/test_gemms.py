"""The expert GEMMs' contract on a GPU, and the kernels around them against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.contract.gemm_cases import COUNTS, Case, equals_a_float32_loop
from tests.gpu.needs import needs_gpus, needs_library
from toolkit.config.model import ModelConfig
from toolkit.engine.fp8 import BlockFp8, Matrix, quantize_blocks, quantize_groups
from toolkit.engine.layers import linear, swiglu
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import AutoGemm
from toolkit.engine.moe.triton_gemm import TritonGemm
from toolkit.engine.weights import DummyWeights, Shard, open_weights

pytestmark = needs_gpus(1)

DEEP_GEMM = [
    Case("deep_gemm", layout, rows, weighted, decode, "cuda", hidden=256, ffn=256, tolerance=tolerance)  # type: ignore[arg-type]
    for rows, tolerance in (("bfloat16", 1e-2), ("fp8", 6e-2), ("fp8_rows", 6e-2))
    for layout, weighted, decode in (
        ("contiguous", False, False),
        ("contiguous", True, True),
        ("masked", False, True),
    )
]
TORCH = [
    Case(backend, layout, rows, weighted, False, "cuda", hidden=256, ffn=256, tolerance=1e-2)  # type: ignore[arg-type]
    for backend, rows in (("torch", "float32"), ("torch", "bfloat16"), ("grouped_mm", "bfloat16"))
    for layout, weighted in (("contiguous", True), ("masked", False))
]
TRITON = [
    Case("triton", layout, "bfloat16", weighted, True, "cuda", hidden=256, ffn=384, tolerance=1e-2)  # type: ignore[arg-type]
    for layout, weighted in (("contiguous", False), ("contiguous", True), ("masked", False))
]


def case_id(case: object) -> str:
    return str(case).removeprefix("Case") if not isinstance(case, Case) else (
        f"{case.backend}-{case.layout}-{case.rows}{'-weighted' * case.weighted}{'-decode' * case.decode}"
    )  # fmt: skip


@pytest.mark.parametrize("case", TORCH, ids=case_id)
def test_torch_equals_a_float32_loop(case: Case) -> None:
    for counts in COUNTS:
        equals_a_float32_loop(case, counts)


@needs_library("deep_gemm")
@pytest.mark.parametrize("case", DEEP_GEMM, ids=case_id)
def test_deep_gemm_equals_a_float32_loop(case: Case) -> None:
    for counts in (*COUNTS, (130, 0, 1, 300)):
        equals_a_float32_loop(case, counts)


@pytest.mark.parametrize("expected", [1, 20, 60, 500])
@pytest.mark.parametrize("case", TRITON, ids=case_id)
def test_triton_equals_a_float32_loop(case: Case, expected: int) -> None:
    """For each size of its tiles, with fewer and with more rows than were expected."""
    for counts in (*COUNTS, (30, 0, 1, 17), (130, 0, 1, 300)):
        equals_a_float32_loop(case, counts, expected=expected)


def test_auto_takes_triton_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    case = Case("auto", "contiguous", "bfloat16", decode=True, device="cuda", hidden=256, ffn=256, tolerance=1e-2)
    gemm, took, call = AutoGemm(), [], TritonGemm.__call__

    def noted(self: TritonGemm, rows: Dispatched) -> torch.Tensor:
        took.append(rows.expected)
        return call(self, rows)

    monkeypatch.setattr(TritonGemm, "__call__", noted)
    for expected in (5, 32, 33, 700):
        equals_a_float32_loop(case, (65, 0, 3, 8), gemm, expected)
    assert took == [5, 32]
    assert [*gemm.shapes(300, 64)][:3] == [10, 32, 64]


@pytest.mark.parametrize("by_column", [True, False])
def test_quantisation_is_torchs(by_column: bool) -> None:
    from toolkit.engine.kernels import rows

    x = torch.randn(7, 5, 384, device="cuda", dtype=torch.bfloat16) * 3
    counts = torch.tensor([5, 0, 3, 1, 5, 2, 4], dtype=torch.int32, device="cuda")
    q, scales = rows.quantize(x, rows.Real(counts), by_column)
    wanted, wanted_scales = quantize_groups(x)
    for slot, count in enumerate(counts.tolist()):
        torch.testing.assert_close(scales[slot, :count], wanted_scales[slot, :count])
        a, b = q[slot, :count].float(), wanted[slot, :count].float()
        assert bool(((a - b).abs() <= 0.0725 * b.abs() + 1e-3).all()), "more than the rounding of one bit"
        assert float((a != b).float().mean()) < 0.01 if count else True


def test_swiglu_is_torchs() -> None:
    from toolkit.engine.kernels import rows

    x = torch.randn(9, 1536, device="cuda", dtype=torch.bfloat16)
    by, count = torch.rand(9, device="cuda"), torch.tensor([7], dtype=torch.int32, device="cuda")
    gate, up = x.float().chunk(2, dim=-1)
    wanted = F.silu(gate) * up * by[:, None]
    torch.testing.assert_close(rows.swiglu(x, by, rows.Real(count))[:7].float(), wanted[:7], rtol=1e-2, atol=1e-2)
    q, scales = rows.swiglu_quantize(x, by, rows.Real(count))
    back = q.float().unflatten(-1, (-1, 128)) * scales[..., None]
    torch.testing.assert_close(back.flatten(-2)[:7], wanted[:7], rtol=7e-2, atol=1e-3)


@needs_library("deep_gemm")
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_linear_in_fp8(rows: int) -> None:
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    weight = quantize_blocks(torch.randn(384, 512, device="cuda") / 512**0.5)
    out = linear(x, weight).float()
    wanted = x.float() @ weight.dequantize(torch.float32).T
    assert float((out - wanted).norm() / wanted.norm()) < 5e-2


@needs_library("deep_gemm")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 77])
def test_gated_ffn_in_fused_kernels(fp8: bool, rows: int) -> None:
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    gate_up, down = torch.randn(768, 512, device="cuda") / 512**0.5, torch.randn(512, 384, device="cuda") / 384**0.5
    given: list[Matrix] = [quantize_blocks(w) if fp8 else w.to(torch.bfloat16) for w in (gate_up, down)]
    exact = [w.dequantize(torch.float32) if isinstance(w, BlockFp8) else w.float() for w in given]
    out = swiglu(x, *given).float()
    gate, up = (x.float() @ exact[0].T).chunk(2, dim=-1)
    wanted = (F.silu(gate) * up) @ exact[1].T
    assert float((out - wanted).norm() / wanted.norm()) < (6e-2 if fp8 else 1e-2)


def test_dummy_weights_are_made_on_the_gpu_and_in_fp8() -> None:
    made = open_weights(ModelConfig(load_format="dummy", dtype="bfloat16"), "cuda", keep_fp8=True)
    assert isinstance(made, DummyWeights)
    whole, part = made.get_matrix("a.weight", (256, 384)), made.get_matrix("a.weight", (256, 384), Shard(0, 1, 2))
    assert isinstance(whole, BlockFp8) and isinstance(part, BlockFp8) and whole.weight_NK.is_cuda
    torch.testing.assert_close(whole.dequantize(torch.float32)[128:], part.dequantize(torch.float32))
    plain = made.get("a.weight", (256, 384)).float()
    error = (whole.dequantize(torch.float32) - plain).norm() / plain.norm()
    assert float(error) < 5e-2
    assert not isinstance(made.get_matrix("b.weight", (200, 384)), BlockFp8), "not of whole blocks"
