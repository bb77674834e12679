"""Triton kernels around the expert GEMMs: rows to their slots, SwiGLU, FP8 quantisation, rows back to their tokens.

None waits on the host, so all of them can be captured in a CUDA graph: how many rows are real is read on the GPU.
n: received rows, K: top-k, D: hidden, R: placed rows, F: expert FFN columns, e: slots of this rank.
Imported only where there is a GPU; the same arithmetic in torch is ``moe/place.py`` and ``fp8.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.gpu_libraries import scales_are_powers_of_two
from toolkit.engine.kernels.chain import chained, follow

FP8_MAX = 448.0  # largest float8_e4m3
SMALLEST = 1e-4  # least maximum of a group, as in DeepSeek's release: keeps scales of empty groups finite
GROUP = 128  # columns that share a scale
PROGRAMS = 2048  # rows in flight of a kernel that walks over rows: several for each of an H100's 132 multiprocessors


# Sizes that change from step to step are not specialised: a new one must never be compiled while requests wait.
@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(local_ptr, position_ptr, counts_ptr, pairs, e, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(local_ptr + i, mask=i < pairs, other=-1)
    mine = (slot >= 0) & (slot < e)
    position = tl.atomic_add(counts_ptr + tl.where(mine, slot, 0), 1, mask=mine)
    tl.store(position_ptr + i, tl.where(mine, position, -1), mask=i < pairs)


@triton.jit(do_not_specialize=["scales_stride"])
def _scatter_kernel(
    x_ptr, local_ptr, position_ptr, counts_ptr, rows_ptr, ends_ptr, out_ptr, scales_ptr, out_scales_ptr,
    e, D, G, scales_stride, ALIGNMENT: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    counts = tl.load(counts_ptr + slots, mask=slots < e, other=0)
    padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    starts = tl.cumsum(padded, 0) - padded
    if token == 0:
        tl.store(ends_ptr + slots, starts + counts, mask=slots < e)
    for k in tl.static_range(K):
        position = tl.load(position_ptr + token * K + k)
        row = tl.full((), -1, tl.int64)
        if position >= 0:
            slot = tl.load(local_ptr + token * K + k)
            row = tl.sum(tl.where(slots == slot, starts, 0), 0).to(tl.int64) + position
            for first in range(0, D, BLOCK):
                d = first + tl.arange(0, BLOCK)
                value = tl.load(x_ptr + token * D + d, mask=d < D)
                tl.store(out_ptr + row * D + d, value, mask=d < D)
            if GROUPS > 0:
                g = tl.arange(0, GROUPS)
                scale = tl.load(scales_ptr + token * G + g, mask=g < G)
                tl.store(out_scales_ptr + g * scales_stride + row, scale, mask=g < G)
        tl.store(rows_ptr + token * K + k, row)


@triton.jit
def weighted_sum(y_ptr, rows, weights, d, D):
    """Columns ``d`` of the sum over rows y[rows [K]] (-1: none) times weights [K], in float32; loads them together."""
    real = rows >= 0
    y = tl.load(y_ptr + rows[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    return tl.sum(y.to(tl.float32) * tl.where(real, weights, 0.0)[:, None], 0)


@triton.jit
def _gather_kernel(
    y_ptr, rows_ptr, weights_ptr, out_ptr, D, K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d, k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K_BLOCK)
    rows = tl.load(rows_ptr + token * K + k, mask=k < K, other=-1)
    weights = tl.load(weights_ptr + token * K + k, mask=k < K, other=0.0)
    tl.store(out_ptr + token * D + d, weighted_sum(y_ptr, rows, weights, d, D), mask=d < D)


@triton.jit(do_not_specialize=["M", "s_slot", "s_row", "s_group"])
def _quantize_kernel(
    x_ptr, weights_ptr, counts_ptr, ends_ptr, q_ptr, s_ptr, M, C, s_slot, s_row, s_group,
    GLU: tl.constexpr, FP8: tl.constexpr, GROUPS: tl.constexpr, COUNTED: tl.constexpr, ENDED: tl.constexpr,
    WEIGHTED: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr, SMALL: tl.constexpr, POWER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rows [e, M, C] (or [e, M, 2C] where GLU) -> [e, M, C], in FP8 with a scale a group of SIZE columns, or not.

    Where ENDED, slots lie in one [R, C], each before its end.
    """
    follow(PDL)
    slot = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + slot) if COUNTED else M
    start = tl.load(ends_ptr + slot) - count if ENDED else slot * M
    g = tl.arange(0, GROUPS)
    c = g[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = c < C
    for m in range(tl.program_id(1), count, tl.num_programs(1)):
        row = (start + m).to(tl.int64)
        if GLU:
            gate = tl.load(x_ptr + row * 2 * C + c, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(x_ptr + row * 2 * C + C + c, mask=inside, other=0.0).to(tl.float32)
            value = gate / (1.0 + tl.exp(-gate)) * up
            if WEIGHTED:
                value = value * tl.load(weights_ptr + row)
        else:
            value = tl.load(x_ptr + row * C + c, mask=inside, other=0.0).to(tl.float32)
        if FP8:
            largest = tl.maximum(tl.max(tl.abs(value), 1), SMALL)
            scale = largest / FULL
            if POWER:
                scale = tl.exp2(tl.ceil(tl.log2(scale)))
            where = row * s_row if ENDED else slot * s_slot + m * s_row
            tl.store(s_ptr + where + g * s_group, scale, mask=g * SIZE < C)
            value = value * (1.0 / scale)[:, None]
        tl.store(q_ptr + row * C + c, value.to(q_ptr.dtype.element_ty), mask=inside)


def scatter_rows(
    x: Tensor, scales: Tensor | None, local_nK: Tensor, num_local: int, alignment: int, room: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Rows x [n, D] to every slot of theirs.

    Args:
        scales: float32 [n, D / 128] where x is FP8.
        local_nK: local slots; others than 0..num_local-1 are not of this rank.
        room: R, at least the rows that any routing needs.

    Returns:
        placed rows [R, D], their scales (column-major, as DeepGEMM reads them), rows [n, K] (-1: nowhere), counts and
        ends [num_local] int32.
    """
    n, top_k = local_nK.shape
    counts = torch.zeros(num_local, dtype=torch.int32, device=x.device)
    ends, rows = torch.zeros_like(counts), torch.empty(n, top_k, dtype=torch.int64, device=x.device)
    out = x.new_empty(room, x.shape[1])
    out_scales = None if scales is None else column_major((room, scales.shape[1]), x.device)
    if n:
        local = local_nK.contiguous()
        position = torch.empty(n, top_k, dtype=torch.int32, device=x.device)
        _count_kernel[(triton.cdiv(n * top_k, 256),)](local, position, counts, n * top_k, num_local, BLOCK=256)
        groups = 0 if scales is None else triton.next_power_of_2(scales.shape[1])
        _scatter_kernel[(n,)](
            x.contiguous().view(torch.int8) if scales is not None else x.contiguous(), local, position, counts, rows,
            ends, out.view(torch.int8) if scales is not None else out, scales, out_scales, num_local, x.shape[1],
            0 if scales is None else scales.shape[1], 0 if out_scales is None else out_scales.stride(1),
            ALIGNMENT=alignment, K=top_k, SLOTS=triton.next_power_of_2(num_local),
            BLOCK=min(triton.next_power_of_2(x.shape[1]), 2048), GROUPS=groups, num_warps=4,
        )  # fmt: skip
    return out, out_scales, rows, counts, ends


def gather_rows(y: Tensor, rows_nK: Tensor, weights_nK: Tensor, dtype: torch.dtype) -> Tensor:
    """Each token's weighted sum of its placed rows y [R, D] -> [n, D]."""
    n, top_k = rows_nK.shape
    out = torch.empty(n, y.shape[1], dtype=dtype, device=y.device)
    if n:
        block = min(triton.next_power_of_2(y.shape[1]), 1024)
        grid = (n, triton.cdiv(y.shape[1], block))
        _gather_kernel[grid](
            y, rows_nK, weights_nK.float().contiguous(), out, y.shape[1],
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=block,
        )  # fmt: skip
    return out


def column_major(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Empty float32 scales [..., M, groups] whose rows lie side by side, padded to 16 bytes: what TMA loads."""
    *lead, rows, groups = shape
    return torch.empty(*lead, groups, -(-rows // 4) * 4, device=device).transpose(-1, -2)[..., :rows, :]


@dataclass(frozen=True)
class Real:
    """Which rows of a layout are real, read on the GPU.

    Attributes:
        counts: int32, of each slot: [1] for rows [M, ..], [e] for [e, M, ..].
        ends: int32 [e], where slots lie in rows [R, ..]: the row after each slot's last.
    """

    counts: Tensor
    ends: Tensor | None = None


def quantize(x: Tensor, real: Real | None = None, by_column: bool = True) -> tuple[Tensor, Tensor]:
    """x [M, D] or [e, M, D] -> float8_e4m3 and float32 scales of each row's groups of 128.

    Args:
        real: rows to be read; None: all.
        by_column: scales as DeepGEMM reads them; otherwise row by row, as DeepEP sends them.
    """
    shape = (*x.shape[:-1], -(-x.shape[-1] // GROUP))
    scales = column_major(shape, x.device) if by_column else torch.empty(shape, device=x.device)
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    _run(x.contiguous(), None, real, q, scales, glu=False)
    return q, scales


def swiglu_quantize(gate_up: Tensor, weights: Tensor | None, real: Real | None) -> tuple[Tensor, Tensor]:
    """silu(gate) * up (* each row's weight) of [.., M, 2F] -> float8_e4m3 [.., M, F] and column-major scales."""
    *lead, columns = gate_up.shape
    q = torch.empty(*lead, columns // 2, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = column_major((*lead, -(-columns // 2 // GROUP)), gate_up.device)
    _run(gate_up, weights, real, q, scales, glu=True)
    return q, scales


def swiglu(gate_up: Tensor, weights: Tensor | None, real: Real | None) -> Tensor:
    """silu(gate) * up (* each row's weight) of [.., M, 2F] -> [.., M, F] in the same type."""
    *lead, columns = gate_up.shape
    out = torch.empty(*lead, columns // 2, dtype=gate_up.dtype, device=gate_up.device)
    _run(gate_up, weights, real, out, None, glu=True)
    return out


def _run(x: Tensor, weights: Tensor | None, real: Real | None, out: Tensor, scales: Tensor | None, glu: bool) -> None:
    slots, rows = (1, x.shape[0]) if x.dim() == 2 else (x.shape[0], x.shape[1])
    counts, ends = (None, None) if real is None else (real.counts, real.ends)
    if ends is not None:
        slots = len(ends)
    if not out.numel():
        return
    columns = out.shape[-1]
    strides: tuple[Any, ...] = (0, 0, 0)
    if scales is not None:
        strides = (scales.stride(0) if x.dim() == 3 else 0, scales.stride(-2), scales.stride(-1))
    grid = (slots, min(rows, max(1, PROGRAMS // slots)))
    _quantize_kernel[grid](
        x, weights, counts, ends, out, scales, rows, columns, *strides,
        GLU=glu, FP8=scales is not None, GROUPS=triton.next_power_of_2(-(-columns // GROUP)),
        COUNTED=counts is not None, ENDED=ends is not None, WEIGHTED=weights is not None,
        SIZE=GROUP, FULL=FP8_MAX, SMALL=SMALLEST, POWER=scales_are_powers_of_two(),
        num_warps=8 if columns > 1024 else 4, **chained(),
    )  # fmt: skip
