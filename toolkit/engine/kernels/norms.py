"""RMS norm, alone and after the residual addition: one program a row, one pass over memory.

Rounds where ``layers.RMSNorm`` does: the quotient to the input's type, then the product with the weight. What is added
may come in parts, in float32, that a product left (``kernels/linear.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow


@triton.jit
def normed(x, weight, size, eps, ADD_ONE: tl.constexpr):
    """A row's norm; columns of x beyond ``size`` are 0."""
    wide = x.to(tl.float32)
    out = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    if not ADD_ONE:
        out = out.to(x.dtype).to(tl.float32)
    return (out * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def added(x, delta):
    """x + delta, rounded once each."""
    return (x.to(tl.float32) + delta.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["part_stride"])
def _norm_kernel(
    x_ptr, delta_ptr, sum_ptr, weight_ptr, out_ptr, x_stride, delta_stride, part_stride, size, eps,
    ADD: tl.constexpr, PARTS: tl.constexpr, ADD_ONE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)  # which no kernel of a step writes
    follow(PDL)
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * delta_stride + columns, mask=mask, other=0.0)
        for part in tl.static_range(1, PARTS):
            at = delta_ptr + part * part_stride.to(tl.int64) + row * delta_stride + columns
            delta += tl.load(at, mask=mask, other=0.0)
        x = added(x, delta)
        tl.store(sum_ptr + row * size + columns, x, mask=mask)
    tl.store(out_ptr + row * size + columns, normed(x, weight, size, eps, ADD_ONE), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, add_one: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        _launch(rows, rows[None], out, weight, out, eps, add=False, add_one=add_one)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, add_one: bool) -> tuple[Tensor, Tensor]:
    """``delta``: [n, size], or parts [P, n, size] of it."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(total)
    if len(x):
        parts = delta if delta.dim() == 3 else delta[None]
        _launch(x, parts, total, weight, out, eps, add=True, add_one=add_one)
    return total, out


def _launch(
    x: Tensor, parts: Tensor, total: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool, add_one: bool
) -> None:
    rows, size = x.shape
    block, share = triton.next_power_of_2(size), 512 if len(parts) == 1 else 256
    _norm_kernel[(rows,)](
        x, parts, total, weight, out, x.stride(0), parts.stride(1), parts.stride(0), size, eps,
        ADD=add, PARTS=len(parts), ADD_ONE=add_one, BLOCK=block, num_warps=min(max(block // share, 1), 16),
        **chained(rows),
    )  # fmt: skip
