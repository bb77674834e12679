"""Experts by DeepGEMM's grouped GEMMs, in FP8 or bf16, on both layouts; SwiGLU and quantisation in one kernel between.

R: rows, M: rows a slot at most, e: slots of this rank, F: expert FFN columns, D: hidden. DeepGEMM compiles a kernel
for each shape when it is first used; ``toolkit/engine/gpu_libraries.py`` says where the results are kept. On Hopper
scales are float32; on Blackwell they are powers of two, which the library packs itself: written to its documented
interface, not run. Knows nothing of routing.
Read next: ``toolkit/engine/kernels/rows.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.gpu_libraries import import_gpu_library, scales_are_powers_of_two
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import GEMMS, ExpertWeights

# DeepGEMM chooses tiles by the rows expected of a slot. Fewer than a tile's height are one tile, and beyond it the
# choice hardly changes: sizes between are rounded up, so that few kernels are compiled.
STEP = 4


@GEMMS.register("deep_gemm")
class DeepGemm:
    def __init__(self) -> None:
        self.alignment, self.decode_alignment = 128, 64  # heights of tiles: decode has few rows a slot
        self._library: Any = import_gpu_library("deep_gemm", "engine.moe_runner_backend=deep_gemm")
        from toolkit.engine.kernels import rows as kernels
        from toolkit.engine.kernels.chain import chained

        self._library.set_pdl(chained()["PDL"])
        self._kernels = kernels
        if scales_are_powers_of_two():  # Blackwell has one height of tiles
            self.alignment = self.decode_alignment = self._library.get_theoretical_mk_alignment_for_contiguous_layout()

    def pack(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def __call__(self, rows: Dispatched) -> Tensor:
        w, kernels = self.weights, self._kernels
        real = self._real(rows)
        x: Any = rows.x
        if w.fp8:
            x = (rows.x, rows.scales) if rows.scales is not None else kernels.quantize(rows.x, real)
        lead = rows.x.shape[:-1]
        gate_up = torch.empty(*lead, w.gate_up.shape[1], dtype=torch.bfloat16, device=rows.x.device)
        self._multiply(x, w.gate_up, w.gate_up_scales, gate_up, rows)
        a: Any
        if w.fp8:
            a = kernels.swiglu_quantize(gate_up, rows.weights, real)
        else:
            a = kernels.swiglu(gate_up, rows.weights, real)
        out = torch.empty(*lead, w.down.shape[1], dtype=torch.bfloat16, device=rows.x.device)
        self._multiply(a, w.down, w.down_scales, out, rows)
        return out

    def _real(self, rows: Dispatched) -> Any:
        """Slot by slot where padding would be much of the work; else all rows in one, however uneven slots are."""
        if rows.layout == "masked":
            return self._kernels.Real(rows.counts)
        if rows.expected <= 2 * rows.alignment:
            return self._kernels.Real(rows.counts, rows.ends)
        return self._kernels.Real(rows.ends[-1:])

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        size = alignment
        yield size
        while size < most:
            size *= STEP
            yield size

    def _multiply(self, a: Any, weight: Tensor, scales: Tensor | None, out: Tensor, rows: Dispatched) -> None:
        b = weight if scales is None else (weight, scales)
        kind = "bf16" if scales is None else "fp8"
        expected = next(size for size in self.shapes(rows.expected, rows.alignment) if size >= rows.expected)
        if rows.layout == "masked":
            assert not out.shape[1] % self.alignment, f"tiles of {self.alignment} rows do not end with {out.shape[1]}"
            masked = getattr(self._library, f"m_grouped_{kind}_gemm_nt_masked")
            masked(a, b, out, rows.counts, min(expected, out.shape[1]))
            return
        # DeepGEMM keeps the alignment, which is also the tile's height, as a setting of the process
        self._library.set_mk_alignment_for_contiguous_layout(rows.alignment)
        contiguous = getattr(self._library, f"m_grouped_{kind}_gemm_nt_contiguous")
        contiguous(a, b, out, rows.ends, use_psum_layout=True, expected_m_for_psum_layout=expected)
