"""The contract of every ExpertGemm (toolkit/engine/moe/gemm.py): equal to a float32 loop, in both layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import GEMMS, ExpertWeights, make_gemm

SLOTS, HIDDEN, FFN = 4, 16, 24
COUNTS = [(3, 0, 5, 1), (0, 0, 0, 0), (0, 0, 0, 9), (1, 1, 1, 1)]
BACKENDS = ["torch"]


def weights(dtype: torch.dtype, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(SLOTS, 2 * FFN, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(SLOTS, HIDDEN, FFN, generator=generator) / FFN**0.5
    return ExpertWeights(gate_up.to(dtype), down.to(dtype))


def loop(x: torch.Tensor, w: ExpertWeights, slot: int) -> torch.Tensor:
    gate, up = (x.float() @ w.gate_up[slot].float().T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w.down[slot].float().T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_a_float32_loop(backend: str, counts: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    gemm, w = make_gemm(backend), weights(dtype)
    gemm.pack(w)
    alignment = max(gemm.alignment, 4)
    if layout == "masked":
        starts = [0] * SLOTS
        x = torch.randn(SLOTS, 12, HIDDEN).to(dtype)
    else:
        padded = [-(-c // alignment) * alignment for c in counts]
        starts = [sum(padded[:s]) for s in range(SLOTS)]
        x = torch.randn(sum(padded), HIDDEN).to(dtype)
    rows = Dispatched(layout, x, None, torch.tensor(counts), torch.tensor(starts))  # type: ignore[arg-type]
    out = gemm(rows)
    assert out.shape == x.shape
    for slot, (count, start) in enumerate(zip(counts, starts, strict=True)):
        given = (x[slot] if layout == "masked" else x[start:])[:count]
        found = (out[slot] if layout == "masked" else out[start:])[:count]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found.float(), loop(given, w, slot), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pack_again_takes_new_weights(backend: str) -> None:
    gemm = make_gemm(backend)
    x = torch.randn(2, HIDDEN)
    rows = Dispatched("contiguous", x, None, torch.tensor([2, 0, 0, 0]), torch.tensor([0, 2, 2, 2]))
    for seed in (1, 2):
        w = weights(torch.float32, seed)
        gemm.pack(w)
        torch.testing.assert_close(gemm(rows), loop(x, w, 0), rtol=1e-5, atol=1e-5)


def test_the_suite_runs_over_every_backend() -> None:
    assert sorted(GEMMS) == sorted(BACKENDS)
