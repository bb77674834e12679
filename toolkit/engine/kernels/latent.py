"""MLA between its projections and the scores: the latent's norm, RoPE in interleaved pairs, the write into the cache.

Rounds where ``layers.RMSNorm`` and ``layers.Rotary`` do. C: latent, R: rotated values, H: heads, T: tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.fp8 import FP8_MAX
from toolkit.engine.kernels.chain import chained, follow
from toolkit.engine.layers import RMSNorm, Rotary


@triton.jit
def _within(x, MOST: tl.constexpr):
    """x in float32, at most MOST in size; 0: x as it is."""
    return tl.minimum(tl.maximum(x.to(tl.float32), -MOST), MOST) if MOST > 0 else x


@triton.jit
def _write_kernel(
    kv_ptr, weight_ptr, cos_ptr, sin_ptr, positions_ptr, rows_ptr, cache_ptr, stride, eps,
    C: tl.constexpr, R: tl.constexpr, C_BLOCK: tl.constexpr, HALF: tl.constexpr, MOST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    target = cache_ptr + tl.load(rows_ptr + token).to(tl.int64) * (C + R)
    i = tl.arange(0, C_BLOCK)
    latent = tl.load(kv_ptr + token * stride + i, mask=i < C, other=0.0)
    wide = latent.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / C + eps)).to(latent.dtype)
    normed = normed * tl.load(weight_ptr + i, mask=i < C, other=0.0)
    tl.store(target + i, _within(normed, MOST).to(cache_ptr.dtype.element_ty), mask=i < C)
    pair = tl.arange(0, HALF)
    mask = 2 * pair < R
    a = tl.load(kv_ptr + token * stride + C + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(kv_ptr + token * stride + C + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * (R // 2) + pair, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * (R // 2) + pair, mask=mask, other=0.0)
    first, second = (a * cos - b * sin).to(latent.dtype), (b * cos + a * sin).to(latent.dtype)
    tl.store(target + C + 2 * pair, _within(first, MOST).to(cache_ptr.dtype.element_ty), mask=mask)
    tl.store(target + C + 2 * pair + 1, _within(second, MOST).to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, token_stride, head_stride, heads,
    R: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    mask = (2 * pair < R) & (head < heads)
    at = x_ptr + token * token_stride + head * head_stride + 2 * pair
    a, b = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * (R // 2) + pair, mask=2 * pair < R, other=0.0)
    sin = tl.load(sin_ptr + position * (R // 2) + pair, mask=2 * pair < R, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    tl.store(at, (wide_a * cos - wide_b * sin).to(a.dtype), mask=mask)
    tl.store(at + 1, (wide_b * cos + wide_a * sin).to(a.dtype), mask=mask)


def write_latent(kv: Tensor, norm: RMSNorm, rotary: Rotary, positions_T: Tensor, cache: Tensor, rows_T: Tensor) -> None:
    tokens, rope = len(kv), 2 * rotary.cos.shape[1]
    latent = kv.shape[1] - rope
    assert rotary.interleaved and not norm.add_one and cache.is_contiguous() and kv.stride(1) == 1
    if tokens:
        _write_kernel[(tokens,)](
            kv, norm.weight, rotary.cos, rotary.sin, positions_T, rows_T, cache, kv.stride(0), norm.eps,
            C=latent, R=rope, C_BLOCK=triton.next_power_of_2(latent), HALF=triton.next_power_of_2(rope // 2),
            MOST=FP8_MAX if cache.dtype == torch.float8_e4m3fn else 0, num_warps=2,
            **chained(tokens),
        )  # fmt: skip


def rotate_pairs(x: Tensor, rotary: Rotary, positions_T: Tensor) -> None:
    tokens, heads, rope = x.shape
    assert rotary.interleaved and 2 * rotary.cos.shape[1] == rope and x.stride(2) == 1
    if tokens:
        together = min(16, triton.next_power_of_2(heads))
        _rotate_kernel[(tokens, triton.cdiv(heads, together))](
            x, rotary.cos, rotary.sin, positions_T, x.stride(0), x.stride(1), heads,
            R=rope, HEADS=together, HALF=triton.next_power_of_2(rope // 2), num_warps=2,
            **chained(tokens),
        )  # fmt: skip
