"""The experts' products of a decode step in bf16: few rows a slot, so that the time is that of reading the weights.

A library's tile holds 64 rows, and reads that many of each slot from L2 for every tile of weights, real or not: half
as much again as the weights. Here the weights are the tall side of a tile and only real rows are read; SwiGLU is the
end of the first product. Two launches, which find their tiles from the counts on the GPU.
Matrices are read by TMA (Hopper and later); sizes of tiles are ``moe/triton_gemm.py``'s.
e: slots of this rank, R: placed rows, F: expert FFN columns, D: hidden. Read next: ``moe/triton_gemm.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from toolkit.engine.kernels.chain import chained, follow


@dataclass(frozen=True)
class Tiles:
    """Of one product: rows of activations, rows of weights and columns at a time, stages in flight, warps."""

    rows: int
    weights: int
    columns: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Slots:
    """Which rows are each slot's.

    Attributes:
        counts: int32 [e]. ends: int32 [e], the row after each slot's last; None: slots have an [M, ..] each.
        expected: rows a slot, about: chooses how many programs there are, not what they can do.
    """

    counts: Tensor
    ends: Tensor | None
    expected: int

    def grid(self, columns: int, tiles: Tiles) -> tuple[int, int]:
        slots = len(self.counts)
        return columns // tiles.weights, slots + slots * self.expected // tiles.rows

    def options(self, tiles: Tiles) -> dict[str, int | bool]:
        """Of a launch."""
        return {
            "ENDED": self.ends is not None, "SLOTS": triton.next_power_of_2(len(self.counts)), "ROWS": tiles.rows,
            "TALL": tiles.weights, "WIDE": tiles.columns, "num_stages": tiles.stages, "num_warps": tiles.warps,
            **chained(),
        }  # fmt: skip


@triton.jit
def _tiles(counts_ptr, e, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Of each slot: its number, its rows, and the tiles of ROWS rows of all slots up to it."""
    slots = tl.arange(0, SLOTS)
    counts = tl.load(counts_ptr + slots, mask=slots < e, other=0)
    return slots, counts, tl.cumsum((counts + ROWS - 1) // ROWS, 0)


@triton.jit
def _rows(slots, counts, upto, tile, ends_ptr, stride, ENDED: tl.constexpr, ROWS: tl.constexpr):
    """Slot, first row and number of real rows from it on, of a tile."""
    slot = tl.sum((upto <= tile).to(tl.int32), 0)
    count = tl.sum(tl.where(slots == slot, counts, 0), 0)
    before = tl.max(tl.where(slots < slot, upto, 0), 0)
    first = (tile - before) * ROWS
    start = (tl.load(ends_ptr + slot) - count).to(tl.int64) if ENDED else slot.to(tl.int64) * stride
    return slot, start + first, count - first


@triton.jit(do_not_specialize=["stride"])
def _gate_up_kernel(
    x_ptr, weight, out_ptr, by_ptr, counts_ptr, ends_ptr, e, stride,
    D: tl.constexpr, F: tl.constexpr, ENDED: tl.constexpr, WEIGHTED: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    slots, counts, upto = _tiles(counts_ptr, e, SLOTS, ROWS)
    row, k, f = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.program_id(0) * TALL
    for tile in range(tl.program_id(1), tl.max(upto, 0), tl.num_programs(1)):
        slot, start, left = _rows(slots, counts, upto, tile, ends_ptr, stride, ENDED, ROWS)
        at, real = slot * 2 * F + f, row < left
        gate, up = tl.zeros((TALL, ROWS), tl.float32), tl.zeros((TALL, ROWS), tl.float32)
        for d in range(0, D, WIDE):
            x = tl.load(x_ptr + (start + row)[:, None] * D + (d + k)[None, :], mask=real[:, None], other=0.0).T
            gate = tl.dot(weight.load([at, d]), x, gate)
            up = tl.dot(weight.load([at + F, d]), x, up)
        out = gate / (1.0 + tl.exp(-gate)) * up
        if WEIGHTED:
            out = out * tl.load(by_ptr + start + row, mask=real, other=0.0)[None, :]
        to = out_ptr + (start + row)[:, None] * F + (f + tl.arange(0, TALL))[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty).T, mask=real[:, None])


@triton.jit(do_not_specialize=["stride"])
def _down_kernel(
    x_ptr, weight, out_ptr, counts_ptr, ends_ptr, e, stride,
    F: tl.constexpr, D: tl.constexpr, ENDED: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    slots, counts, upto = _tiles(counts_ptr, e, SLOTS, ROWS)
    row, k, d = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.program_id(0) * TALL
    for tile in range(tl.program_id(1), tl.max(upto, 0), tl.num_programs(1)):
        slot, start, left = _rows(slots, counts, upto, tile, ends_ptr, stride, ENDED, ROWS)
        real, total = row < left, tl.zeros((TALL, ROWS), tl.float32)
        for f in range(0, F, WIDE):
            x = tl.load(x_ptr + (start + row)[:, None] * F + (f + k)[None, :], mask=real[:, None], other=0.0).T
            total = tl.dot(weight.load([slot * D + d, f]), x, total)
        to = out_ptr + (start + row)[:, None] * D + (d + tl.arange(0, TALL))[None, :]
        tl.store(to, total.to(out_ptr.dtype.element_ty).T, mask=real[:, None])


def describe(weight: Tensor, tiles: Tiles) -> TensorDescriptor:
    """Weights [e, N, K] as a multiprocessor's copy engine reads them, tile by tile.

    Raises:
        ValueError: they are not made of whole tiles.
    """
    _, tall, wide = weight.shape
    if tall % tiles.weights or wide % tiles.columns:
        raise ValueError(f"matrices of {tall} x {wide} are not made of {tiles.weights} x {tiles.columns} tiles")
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [tiles.weights, tiles.columns])


def gate_up(x: Tensor, weight: TensorDescriptor, by: Tensor | None, slots: Slots, tiles: Tiles) -> Tensor:
    """silu(gate) * up (* ``by`` [R]) of each slot's rows -> like x, with F columns; other rows are anything.

    Args:
        x: bf16 [R, D], or [e, M, D] where slots have no ends.
        weight: of gate_up [e, 2F, D], in tiles of which F has whole ones.
    """
    columns, size = weight.shape[1], weight.shape[0] // len(slots.counts) // 2
    out = x.new_empty(*x.shape[:-1], size)
    _gate_up_kernel[slots.grid(size, tiles)](
        x, weight, out, by, slots.counts, slots.ends, len(slots.counts), x.stride(0) // columns, D=columns, F=size,
        WEIGHTED=by is not None, **slots.options(tiles),
    )  # fmt: skip
    return out


def down(x: Tensor, weight: TensorDescriptor, slots: Slots, tiles: Tiles) -> Tensor:
    """Each slot's rows times its matrix of down [e, D, F] -> like x, with D columns."""
    columns, size = weight.shape[1], weight.shape[0] // len(slots.counts)
    out = x.new_empty(*x.shape[:-1], size)
    _down_kernel[slots.grid(size, tiles)](
        x, weight, out, slots.counts, slots.ends, len(slots.counts), x.stride(0) // columns, F=columns, D=size,
        **slots.options(tiles),
    )  # fmt: skip
    return out
