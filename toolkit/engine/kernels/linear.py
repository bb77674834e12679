"""A product of few rows with a wide matrix, split over the matrix's columns; its parts are left to the next kernel.

With few rows the time goes to reading the matrix, and a library's choice has too few programs at it. n: rows.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow

STEP = 128  # columns at a time
TILE = 32  # of the matrix's rows, a program
PROGRAMS = 320  # between two and three for each of an H100's 132 multiprocessors
HEAD = 256  # columns of the matrix that a program loads before it may see x
LINE = tl.constexpr(64)  # values in a line of the L2 cache
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _into_l2(rows_ptr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Has columns FIRST .. LAST - 1 of some rows [n, 1] fetched, while others finish what this program waits for."""
    if not INTERPRETED:
        for column in tl.static_range(FIRST, LAST, 4 * LINE):
            lines = rows_ptr + column + tl.arange(0, 4)[None, :] * LINE
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
            )


@triton.jit(do_not_specialize=["rows"])
def _parts_kernel(
    x_ptr, weight_ptr, parts_ptr, rows, x_stride,
    N: tl.constexpr, K: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    HEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, part = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1)
    row, k = tl.arange(0, ROWS), part * PART + tl.arange(0, STEP)
    total = tl.zeros((ROWS, TILE), tl.float32)
    if HEAD > 0:
        wide = part * PART + tl.arange(0, HEAD)
        head = tl.load(weight_ptr + n[None, :] * K + wide[:, None])  # which no kernel of a step writes
        _into_l2(weight_ptr + n[:, None] * K + part * PART, HEAD, PART)
        follow(PDL)
        first_x = tl.load(x_ptr + row[:, None] * x_stride + wide[None, :], mask=(row < rows)[:, None], other=0.0)
        total = tl.dot(first_x, head, total)
    else:
        follow(PDL)
    for first in range(HEAD, PART, STEP):
        x = tl.load(x_ptr + row[:, None] * x_stride + (first + k)[None, :], mask=(row < rows)[:, None], other=0.0)
        weight = tl.load(weight_ptr + n[None, :] * K + (first + k)[:, None])
        total = tl.dot(x, weight, total)
    tl.store(parts_ptr + (part * rows + row[:, None]) * N + n[None, :], total, mask=(row < rows)[:, None])


def partial_products(x: Tensor, weight_NK: Tensor, early: bool = False) -> Tensor | None:
    """x [n, K] times weight [N, K] transposed, float32 parts [P, n, N] to be added up; None: not of such shapes.

    At most 64 rows, in bf16.

    Args:
        early: the kernel before is one of the chain, and leaves time to read some of the weight meanwhile.
    """
    (rows, columns), outputs = x.shape, len(weight_NK)
    assert x.stride(1) == 1 and weight_NK.is_contiguous() and rows <= 64, (x.shape, x.stride(), weight_NK.shape)
    count = next((p for p in (8, 4, 2) if p * outputs <= PROGRAMS * TILE and columns % (p * STEP) == 0), 0)
    if outputs % TILE or not count:
        return None
    parts = torch.empty(count, rows, outputs, dtype=torch.float32, device=x.device)
    if rows:
        _parts_kernel[(outputs // TILE, count)](
            x, weight_NK, parts, rows, x.stride(0), N=outputs, K=columns, PART=columns // count,
            ROWS=max(16, triton.next_power_of_2(rows)), TILE=TILE, STEP=STEP,
            HEAD=HEAD if early and columns // count % HEAD == 0 else 0, num_warps=4, num_stages=4, **chained(rows),
        )  # fmt: skip
    return parts
