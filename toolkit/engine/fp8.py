"""FP8 weights in blocks, as DeepSeek's checkpoints hold them: float8_e4m3 values, a float32 scale for each block.

N: rows, K: columns; a block is ``block`` = (128, 128) of the full matrix, smaller at its right and lower edge.
Knows no files. Read next: ``weights.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFp8:
    """A part of a block-quantised matrix, as stored.

    Attributes:
        weight_NK: float8_e4m3fn.
        scales: float32, the scale of each block that the part touches; value = weight * scale.
        block: rows and columns of a block.
        offset: row and column of the part's first value inside its first block; (0, 0) where GEMMs on FP8 can use it.
    """

    weight_NK: Tensor
    scales: Tensor
    block: tuple[int, int]
    offset: tuple[int, int]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in ``dtype``, multiplied in float32."""
        rows, columns = (
            (torch.arange(size, device=self.scales.device) + first) // step
            for size, first, step in zip(self.weight_NK.shape, self.offset, self.block)
        )
        return (self.weight_NK.float() * self.scales[rows][:, columns]).to(dtype)


def blocks_of(part: slice, block: int) -> slice:
    """The blocks that rows (or columns) ``part`` touch."""
    return slice(part.start // block, -(-part.stop // block))
