"""Experts in bf16 by the project's own kernels, which are ahead of a library's where slots have few rows each.

Complete, but made for decode: with many rows a library's tiles are better, and ``gemm.AutoGemm`` takes those.
Knows nothing of routing. Read next: ``toolkit/engine/kernels/experts.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import GEMMS, ExpertWeights

if TYPE_CHECKING:
    from toolkit.engine.kernels.experts import Slots

# By the rows expected of a slot, at most: tiles (rows, weights, columns, stages, warps) of gate_up and of down. From a
# sweep as ``toolkit.engine.bench.expert_tiles`` makes it, of even and uneven slots on H200.
SIZES = (
    (10, (16, 64, 128, 3, 4), (16, 64, 128, 3, 4)),
    (32, (64, 64, 128, 4, 4), (64, 128, 64, 4, 4)),
    (64, (128, 64, 128, 3, 4), (128, 128, 64, 3, 8)),
)


@GEMMS.register("triton")
class TritonGemm:
    """``few``: the most rows expected of a slot with which it is ahead of a library, even where slots are uneven."""

    alignment = decode_alignment = 1
    few = 32

    def __init__(self) -> None:
        from toolkit.engine.kernels import experts

        self._kernels = experts
        self._sizes: list[tuple[int, Any, Any]] = []  # as SIZES, of each product the weights and the tiles

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

        def product(weight: Tensor, sizes: tuple[int, ...]) -> tuple[Any, Any]:
            tiles = self._kernels.Tiles(*sizes)
            return self._kernels.describe(weight, tiles), tiles

        self._sizes = [(most, product(weights.gate_up, up), product(weights.down, down)) for most, up, down in SIZES]

    def __call__(self, rows: Dispatched) -> Tensor:
        assert rows.scales is None, "FP8 rows for experts in bf16"
        _, (gate_up, up), (down, to) = next((s for s in self._sizes if rows.expected <= s[0]), self._sizes[-1])
        slots = slots_of(rows)
        a = self._kernels.gate_up(rows.x, gate_up, rows.weights, slots, up)
        out: Tensor = self._kernels.down(a, down, slots, to)
        return out

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        for size, *_ in SIZES:
            yield size
            if size >= most:
                return


def slots_of(rows: Dispatched) -> Slots:
    """Which rows are each slot's, as the kernels want it."""
    from toolkit.engine.kernels.experts import Slots

    return Slots(rows.counts, rows.ends if rows.layout == "contiguous" else None, rows.expected)
