"""Experts in bf16 by the project's own kernels, which are ahead of a library's where slots have few rows each.

Complete, but made for decode: with many rows a library's tiles are better, and ``gemm.AutoGemm`` takes those.
Knows nothing of routing. Read next: ``toolkit/engine/kernels/experts.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import GEMMS, ExpertWeights

# By the rows expected of a slot, at most: tiles (rows, weights, columns, stages, warps) of gate_up and of down. The
# best of ``toolkit.engine.bench.expert_tiles`` on H200.
SIZES = (
    (10, (16, 64, 128, 3, 4), (16, 64, 128, 3, 4)),
    (32, (64, 64, 64, 3, 4), (64, 128, 64, 4, 8)),
    (64, (128, 64, 128, 3, 4), (128, 128, 64, 3, 8)),
)
FEW = SIZES[-1][0]


@GEMMS.register("triton")
class TritonGemm:
    alignment = decode_alignment = 1

    def __init__(self) -> None:
        from toolkit.engine.kernels import experts

        self._kernels = experts
        self._sizes = [(most, experts.Tiles(*up), experts.Tiles(*down)) for most, up, down in SIZES]
        self._weights: list[tuple[Any, Any]] = []

    @staticmethod
    def takes(weights: ExpertWeights) -> bool:
        """True for experts in bf16 that are made of whole tiles."""
        hidden, ffn = weights.down.shape[1:]
        return weights.down.dtype == torch.bfloat16 and not hidden % 128 and not ffn % 128

    def pack(self, weights: ExpertWeights) -> None:
        if not self.takes(weights):
            raise ValueError(
                f"engine.moe_runner_backend=triton: experts are {weights.down.dtype} of hidden size x FFN columns "
                f"{' x '.join(map(str, weights.down.shape[1:]))}, but it multiplies bfloat16, both sizes multiples of "
                "128: use moe_runner_backend=auto"
            )
        describe = self._kernels.describe
        self._weights = [(describe(weights.gate_up, up), describe(weights.down, down)) for _, up, down in self._sizes]

    def __call__(self, rows: Dispatched) -> Tensor:
        assert rows.scales is None, "FP8 rows for experts in bf16"
        size = next((i for i, (most, *_) in enumerate(SIZES) if rows.expected <= most), len(SIZES) - 1)
        (_, up, down), (gate_up_w, down_w) = self._sizes[size], self._weights[size]
        slots = self._kernels.Slots(rows.counts, rows.ends if rows.layout == "contiguous" else None, rows.expected)
        a = self._kernels.gate_up(rows.x, gate_up_w, rows.weights, slots, up)
        out: Tensor = self._kernels.down(a, down_w, slots, down)
        return out

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        for size, *_ in SIZES:
            yield size
            if size >= most:
                return
