"""FP8 in blocks and groups, as DeepSeek's checkpoints and kernels hold it: float8_e4m3 values and float32 scales.

Weights have a scale for each block of 128 x 128, activations one for each row's group of 128 columns; value times
scale is the number. N: rows, K: columns; a block is ``block`` of the full matrix, smaller at its right and lower edge.
Knows no files and no GPU kernels. Read next: ``weights.py``; on a GPU ``kernels/rows.py`` quantises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0  # largest float8_e4m3
SMALLEST = 1e-4  # least maximum of a block, as in DeepSeek's release: keeps scales of empty blocks finite
BLOCK = 128


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

    @property
    def whole(self) -> bool:
        """True when the part is made of whole blocks of 128 x 128: GEMMs on FP8 can use it."""
        rows, columns = self.weight_NK.shape
        return self.block == (BLOCK, BLOCK) and self.offset == (0, 0) and not rows % BLOCK and not columns % BLOCK

    @property
    def nbytes(self) -> int:
        return self.weight_NK.nbytes + self.scales.nbytes

    def to(self, device: str) -> BlockFp8:
        return BlockFp8(self.weight_NK.to(device), self.scales.to(device), self.block, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in ``dtype``, multiplied in float32."""
        rows, columns = (
            (torch.arange(size, device=self.scales.device) + first) // step
            for size, first, step in zip(self.weight_NK.shape, self.offset, self.block)
        )
        return (self.weight_NK.float() * self.scales[rows][:, columns]).to(dtype)


Matrix = Tensor | BlockFp8


def stack_rows(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of equal width, one below the other. Parts in FP8 must be of whole blocks."""
    fp8 = [part for part in parts if isinstance(part, BlockFp8)]
    plain = [part for part in parts if isinstance(part, Tensor)]
    assert not (fp8 and plain), "FP8 beside other types"
    if plain:
        return torch.cat(plain)
    return BlockFp8(
        torch.cat([p.weight_NK for p in fp8]), torch.cat([p.scales for p in fp8]), fp8[0].block, fp8[0].offset
    )


def quantize_blocks(weight_NK: Tensor, power_of_two: bool = False) -> BlockFp8:
    """A matrix of any shape with one scale a block of 128 x 128.

    Args:
        power_of_two: scales are rounded up to one, as Blackwell's GEMMs read them (UE8M0).
    """
    n, k = weight_NK.shape
    padded = F.pad(weight_NK.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(SMALLEST) / FP8_MAX
    if power_of_two:
        scales = scales.log2().ceil().exp2()
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return BlockFp8(values[:n, :k].contiguous(), scales, (BLOCK, BLOCK), (0, 0))


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., K] with K a multiple of 128 -> float8_e4m3 [.., K] and scales [.., K / 128]."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    scales = groups.abs().amax(-1).clamp_min(SMALLEST) / FP8_MAX
    return (groups / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2), scales


def blocks_of(part: slice, block: int) -> slice:
    """The blocks that rows (or columns) ``part`` touch."""
    return slice(part.start // block, -(-part.stop // block))
