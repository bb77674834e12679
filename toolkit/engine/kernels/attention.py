"""Between the QKV projection and the scores, in one kernel: head norms, RoPE, and the write into the paged cache.

One program a token and a few heads. Rounds where ``layers.RMSNorm`` and ``layers.Rotary`` do. RoPE in halves, not in
interleaved pairs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow
from toolkit.engine.layers import RMSNorm, Rotary


@triton.jit
def _rotate_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, rows_ptr,
    token_stride, head_stride, part_stride, eps,
    H: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, NORM: tl.constexpr, ADD_ONE: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS  # all HEADS of a program are queries, or keys, or values
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (i < HALF) & (h < HEADS)
    source = qkv_ptr + token * token_stride + (first + h) * head_stride + i
    a = tl.load(source, mask=mask, other=0.0)
    b = tl.load(source + HALF, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        a += tl.load(source + part * part_stride, mask=mask, other=0.0)
        b += tl.load(source + part * part_stride + HALF, mask=mask, other=0.0)
    a, b = a.to(q_ptr.dtype.element_ty), b.to(q_ptr.dtype.element_ty)
    if first >= H + KV:  # values: stored as they are
        row = tl.load(rows_ptr + token).to(tl.int64)
        target = v_ptr + (row * KV + first - H - KV + h) * DIM + i
        tl.store(target, a, mask=mask)
        tl.store(target + HALF, b, mask=mask)
    else:
        if NORM:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            factor = tl.rsqrt(tl.sum(wide_a * wide_a + wide_b * wide_b, axis=1) / DIM + eps)[:, None]
            weight_ptr = q_weight_ptr if first < H else k_weight_ptr
            weight_a = tl.load(weight_ptr + i, mask=i < HALF, other=0.0)
            weight_b = tl.load(weight_ptr + HALF + i, mask=i < HALF, other=0.0)
            if ADD_ONE:
                a = (wide_a * factor * weight_a).to(a.dtype)
                b = (wide_b * factor * weight_b).to(b.dtype)
            else:
                a = (wide_a * factor).to(a.dtype) * weight_a
                b = (wide_b * factor).to(b.dtype) * weight_b
        position = tl.load(positions_ptr + token).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + i, mask=i < HALF, other=0.0)
        sin = tl.load(sin_ptr + position * HALF + i, mask=i < HALF, other=0.0)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        rotated_a = (wide_a * cos - wide_b * sin).to(a.dtype)
        rotated_b = (wide_b * cos + wide_a * sin).to(a.dtype)
        if first < H:
            target = q_ptr + (token * H + first + h) * DIM + i
        else:
            row = tl.load(rows_ptr + token).to(tl.int64)
            target = k_ptr + (row * KV + first - H + h) * DIM + i
        tl.store(target, rotated_a, mask=mask)
        tl.store(target + HALF, rotated_b, mask=mask)


def rotate_and_write(
    qkv: Tensor,
    norms: tuple[RMSNorm, RMSNorm] | None,
    rotary: Rotary,
    positions_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows_T: Tensor,
) -> Tensor:
    *_, tokens, heads, dim = qkv.shape
    parts = qkv if qkv.dim() == 4 else qkv[None]
    kv_heads = k_cache.shape[1]
    q_heads = heads - 2 * kv_heads
    assert not rotary.interleaved and 2 * rotary.cos.shape[1] == dim, "only whole heads rotated in halves"
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and qkv.stride(-1) == 1
    q = torch.empty(tokens, q_heads, dim, dtype=k_cache.dtype, device=qkv.device)
    if tokens:
        q_weight, k_weight = (norms[0].weight, norms[1].weight) if norms else (qkv, qkv)
        together = math.gcd(q_heads, kv_heads, 8)
        _rotate_kernel[(tokens, heads // together)](
            parts, q, k_cache, v_cache, q_weight, k_weight, rotary.cos, rotary.sin, positions_T, rows_T,
            parts.stride(1), parts.stride(2), parts.stride(0), norms[0].eps if norms else 0.0,
            H=q_heads, KV=kv_heads, DIM=dim, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
            HEADS=together, NORM=norms is not None, ADD_ONE=norms is not None and norms[0].add_one, PARTS=len(parts),
            num_warps=1,
            **chained(tokens),
        )  # fmt: skip
    return q
