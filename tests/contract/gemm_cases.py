"""What every ExpertGemm must do (toolkit/engine/moe/gemm.py): equal to a float32 loop, in both layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.fp8 import quantize_blocks, quantize_groups
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import ExpertGemm, ExpertWeights, dequantize_rows, make_gemm

COUNTS = [(3, 0, 5, 1), (0, 0, 0, 0), (0, 0, 0, 9), (1, 1, 1, 1)]


@dataclass(frozen=True)
class Case:
    """One GEMM to be held to the contract.

    Attributes:
        rows: float32 and bfloat16: rows and weights alike; fp8: weights in FP8; fp8_rows: rows as well.
        weighted: rows have weights that the experts must scale by.
        decode: the alignment of steps without prefill.
    """

    backend: str
    layout: Literal["contiguous", "masked"]
    rows: Literal["float32", "bfloat16", "fp8", "fp8_rows"]
    weighted: bool = False
    decode: bool = False
    device: str = "cpu"
    hidden: int = 16
    ffn: int = 24
    tolerance: float = 3e-2

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.rows == "float32" else torch.bfloat16

    @property
    def fp8(self) -> bool:
        return self.rows.startswith("fp8")


def weights(case: Case, slots: int = 4, seed: int = 0) -> ExpertWeights:
    """Random experts, in the case's types."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(slots, 2 * case.ffn, case.hidden, generator=generator) / case.hidden**0.5
    down = torch.randn(slots, case.hidden, case.ffn, generator=generator) / case.ffn**0.5
    if not case.fp8:
        return ExpertWeights(gate_up.to(case.device, case.dtype), down.to(case.device, case.dtype))
    first, second = [quantize_blocks(w) for w in gate_up], [quantize_blocks(w) for w in down]
    tensors = (
        torch.stack([b.weight_NK for b in first]), torch.stack([b.weight_NK for b in second]),
        torch.stack([b.scales for b in first]), torch.stack([b.scales for b in second]),
    )  # fmt: skip
    return ExpertWeights(*(t.to(case.device) for t in tensors))


def loop(x: Tensor, w: ExpertWeights, slot: int) -> Tensor:
    """One expert in float32."""
    gate_up, down = w.gate_up[slot].float(), w.down[slot].float()
    if w.gate_up_scales is not None and w.down_scales is not None:
        gate_up = gate_up * _spread(w.gate_up_scales[slot])
        down = down * _spread(w.down_scales[slot])
    gate, up = (x.float() @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def _spread(scales: Tensor) -> Tensor:
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def equals_a_float32_loop(
    case: Case, counts: tuple[int, ...], gemm: ExpertGemm | None = None, expected: int = 0
) -> None:
    """The case's GEMM, or ``gemm``, on rows of ``counts``, against the loop; padding rows hold junk.

    Args:
        expected: rows a slot that the GEMM is told to expect; 0: the most.
    """
    gemm, w = gemm or make_gemm(case.backend, case.device), weights(case, len(counts))
    gemm.pack(w)
    alignment = max(gemm.decode_alignment if case.decode else gemm.alignment, 4)
    generator = torch.Generator().manual_seed(1)
    rows, starts = _rows(case, counts, alignment, generator, gemm.alignment)
    rows = replace(rows, expected=expected or rows.expected)
    out = gemm(rows)
    assert out.shape == rows.x.shape and out.dtype == case.dtype
    x = rows.x if rows.scales is None else dequantize_rows(rows.x, rows.scales)
    for slot, (count, start) in enumerate(zip(counts, starts, strict=True)):
        given = (x[slot] if case.layout == "masked" else x[start:])[:count]
        found = (out[slot] if case.layout == "masked" else out[start:])[:count].float()
        wanted = loop(given, w, slot)
        if rows.weights is not None:
            wanted = wanted * rows.weights[start : start + count, None]
        if case.rows == "float32":
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        elif count:
            error = float((found - wanted).norm() / wanted.norm())
            assert error < case.tolerance, f"slot {slot}: relative error {error:.4f}"


def _rows(
    case: Case, counts: tuple[int, ...], alignment: int, generator: torch.Generator, tile: int
) -> tuple[Dispatched, list[int]]:
    padded = [-(-c // alignment) * alignment for c in counts]
    starts = [0 if case.layout == "masked" else sum(padded[:s]) for s in range(len(counts))]
    most = -(-max(12, *counts) // tile) * tile
    size = (len(counts), most) if case.layout == "masked" else (sum(padded),)
    x = torch.randn(*size, case.hidden, generator=generator).to(case.device, case.dtype)
    scales = None
    if case.rows == "fp8_rows":
        x, scales = quantize_groups(x)
    ends = torch.tensor([start + count for start, count in zip(starts, counts)], dtype=torch.int32)
    by = torch.rand(size[-1], generator=generator).to(case.device) + 0.5 if case.weighted else None
    count = torch.tensor(counts, dtype=torch.int32).to(case.device)
    ends = count if case.layout == "masked" else ends.to(case.device)
    return Dispatched(case.layout, x, scales, count, ends, by, alignment, max(1, *counts)), starts
