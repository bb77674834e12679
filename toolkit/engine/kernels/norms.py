"""RMS norm, alone and after the residual addition: one program a row, one pass over memory.

Rounds where ``layers.RMSNorm`` does: the quotient to the input's type, then the product with the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    x_ptr, delta_ptr, sum_ptr, weight_ptr, out_ptr, x_stride, delta_stride, size, eps,
    ADD: tl.constexpr, ADD_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if ADD:
        x += tl.load(delta_ptr + row * delta_stride + columns, mask=mask, other=0.0)
        tl.store(sum_ptr + row * size + columns, x, mask=mask)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if not ADD_ONE:
        normed = normed.to(x.dtype)
    tl.store(out_ptr + row * size + columns, (normed * weight).to(x.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, add_one: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        _launch(rows, rows, out, weight, out, eps, add=False, add_one=add_one)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, add_one: bool) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(total)
    if len(x):
        _launch(x, delta, total, weight, out, eps, add=True, add_one=add_one)
    return total, out


def _launch(
    x: Tensor, delta: Tensor, total: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool, add_one: bool
) -> None:
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    _norm_kernel[(rows,)](
        x, delta, total, weight, out, x.stride(0), delta.stride(0), size, eps,
        ADD=add, ADD_ONE=add_one, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
