"""Experts by torch's grouped matmul, in bf16: what a GPU uses where DeepGEMM is not installed.

e: slots of this rank, M: rows a slot at most. The contiguous layout only; rows of padding are multiplied too, as the
end of the slot before them. Knows nothing of routing. Read next: ``deep_gemm.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import GEMMS, ExpertWeights


@GEMMS.register("grouped_mm")
class GroupedMm:
    alignment = decode_alignment = 16  # the kernel wants slots to begin at multiples of 16 bytes and more

    def pack(self, weights: ExpertWeights) -> None:
        assert not weights.fp8, "grouped_mm multiplies bf16; the checkpoint's FP8 is dequantised as it is loaded"
        self.weights = weights

    def __call__(self, rows: Dispatched) -> Tensor:
        assert rows.scales is None, "FP8 rows for experts in bf16"
        w = self.weights
        gate_up_t, down_t = w.gate_up.transpose(1, 2), w.down.transpose(1, 2)
        if rows.layout == "masked":
            gate, up = torch.bmm(rows.x, gate_up_t).chunk(2, dim=-1)
            return torch.bmm(F.silu(gate) * up, down_t)
        # ends of the slots with their padding
        ends = ((rows.ends + rows.alignment - 1) // rows.alignment * rows.alignment).to(torch.int32)
        hidden = F.grouped_mm(rows.x, gate_up_t, offs=ends)
        gate, up = hidden.chunk(2, dim=-1)
        a = F.silu(gate) * up
        if rows.weights is not None:
            a = a * rows.weights[:, None].to(a.dtype)
        return F.grouped_mm(a, down_t, offs=ends)

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        return iter(())
