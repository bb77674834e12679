"""Attention of one new token a request over the paged cache: grouped heads, sliding windows, the time that of reading.

One program a request and key head, several on each multiprocessor, so that while one begins or ends the others read.
Tiles of keys and values come by TMA, no larger than a page, so that one block id says where a tile lies; the id of the
next one is read meanwhile. What a request has beyond ``span`` tokens, further programs read; the last of a request's
parts to be done merges them all. Not chained to other kernels (``chain.py``), which was slower (docs/performance.md).
n: requests, H: query heads, D: values a head, P: blocks of a request. Read next: ``attention/triton_decode.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

HEADS = 16  # query heads of a program: a matrix unit's least


@dataclass(frozen=True)
class Shape:
    """Of a program: tokens of a tile; tiles in flight, with the one that is multiplied; warps."""

    tile: int
    stages: int
    warps: int


# By the programs of each multiprocessor, at most. From ``toolkit.engine.bench.attention --shapes`` on H200: few of them
# need many bytes in flight each; of more, small ones are there all at once, and none begins when the others end.
SHAPES = ((2, Shape(64, 3, 4)), (5, Shape(64, 2, 2)), (8, Shape(32, 2, 1)), (math.inf, Shape(32, 3, 1)))
IN_PARTS = Shape(64, 3, 4)  # where contexts may be of any length
FURTHER = 512  # programs at most for what requests have beyond a span: about four for each multiprocessor


def shape_for(programs: int, processors: int) -> Shape:
    return next(shape for most, shape in SHAPES if programs <= most * processors)


@triton.jit
def _first(lens, window, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first token of the tile that holds the first one seen."""
    return tl.maximum(lens - window, 0) // TILE * TILE if WINDOW else lens * 0


@triton.jit
def _further(lens, window, span, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Parts that are read of a request beside its first."""
    return (lens - _first(lens, window, TILE, WINDOW) - 1) // span


@triton.jit
def _attend(
    q, keys, values, table, block, first, last, seen_from, column, scale,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Over tokens ``first`` to ``last``, in float32: the sum of weighed values, the largest score, the sum of weights.

    Weights are powers of two, relative to the largest. ``block``: where the first token lies.
    """
    t = tl.arange(0, TILE)
    total, top = tl.zeros((q.shape[0], D), tl.float32), tl.full((q.shape[0],), float("-inf"), tl.float32)
    whole = tl.zeros((q.shape[0],), tl.float32)
    for start in range(first, last, TILE):
        row = block * PAGE + start % PAGE
        k = keys.load([row, column])
        v = values.load([row, column])
        block = tl.load(table + tl.minimum(start + TILE, last - 1) // PAGE)  # of the next tile, as this one comes
        scores = tl.dot(q, k.T) * scale
        seen = start + t < last
        if WINDOW:
            seen &= start + t >= seen_from
        scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(top, tl.max(scores, 1))
        shares, kept = tl.exp2(scores - larger[:, None]), tl.exp2(top - larger)
        whole = whole * kept + tl.sum(shares, 1)
        total = tl.dot(shares.to(v.dtype), v, total * kept[:, None])
        top = larger
    return total, top, whole


@triton.jit
def _merge(sums_ptr, stats_ptr, parts, step, count, GROUP: tl.constexpr, D: tl.constexpr):
    """What ``_attend`` gave for ``count`` parts of a request -> the sum of weighed values, the sum of weights."""
    d, mine = tl.arange(0, D), tl.arange(0, parts.shape[0]) < GROUP
    total, top = tl.zeros((parts.shape[0], D), tl.float32), tl.full((parts.shape[0],), float("-inf"), tl.float32)
    whole = tl.zeros((parts.shape[0],), tl.float32)
    for number in range(count):
        part = parts + number * step
        its = tl.load(stats_ptr + part * 2, mask=mine, other=0.0, volatile=True)
        larger = tl.maximum(top, its)
        kept, taken = tl.exp2(top - larger), tl.exp2(its - larger)
        whole = whole * kept + tl.load(stats_ptr + part * 2 + 1, mask=mine, other=1.0, volatile=True) * taken
        sums = tl.load(sums_ptr + part[:, None] * D + d[None, :], mask=mine[:, None], other=0.0, volatile=True)
        total = total * kept[:, None] + sums * taken[:, None]
        top = larger
    return total, whole


# One variant for all steps: a new one must never be compiled while requests wait.
@triton.jit(do_not_specialize=["n", "table_stride", "window", "span", "most"])
def _decode_kernel(
    q_ptr, keys, values, out_ptr, sums_ptr, stats_ptr, arrived_ptr, tables_ptr, lens_ptr,
    n, table_stride, scale, window, span, most,
    KV: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    head, begin = tl.program_id(0), tl.program_id(1)
    g, d = tl.arange(0, HEADS), tl.arange(0, D)
    end, stride = begin + 1, 1
    if PARTS:  # programs from n on walk over the further parts of all requests
        r, upto = tl.arange(0, REQUESTS), tl.zeros((REQUESTS,), tl.int32)
        if begin >= n:
            lens = tl.load(lens_ptr + r, mask=r < n, other=1)
            upto = tl.cumsum(_further(lens, window, span, TILE, WINDOW), 0)
            end = n + tl.max(upto, 0)
            stride = tl.num_programs(1) - n
    for task in range(begin, end, stride):
        request, number, count = task, 0, 1
        if PARTS:
            further = task - n
            if further >= 0:
                request = tl.sum((upto <= further).to(tl.int32), 0)
                number = further + 1 - tl.max(tl.where(r < request, upto, 0), 0)
        length = tl.load(lens_ptr + request)
        first, last = _first(length, window, TILE, WINDOW), length
        if PARTS:
            count = _further(length, window, span, TILE, WINDOW) + 1
            first += number * span
            last = tl.minimum(length, first + span)
        table = tables_ptr + request * table_stride
        block = tl.load(table + first // PAGE)
        at = ((request * KV + head) * GROUP + g)[:, None] * D + d[None, :]
        mine = (g < GROUP)[:, None]
        q = tl.load(q_ptr + at, mask=mine, other=0.0)
        total, top, whole = _attend(
            q, keys, values, table, block, first, last, length - window, head * D, scale, D, PAGE, TILE, WINDOW
        )
        complete = count == 1
        if PARTS and count > 1:
            parts, arrived = (request * most * KV + head).to(tl.int64) * GROUP + g, arrived_ptr + request * KV + head
            part = parts + number * KV * GROUP
            tl.store(sums_ptr + part[:, None] * D + d[None, :], total, mask=mine)
            tl.store(stats_ptr + part * 2, top, mask=g < GROUP)
            tl.store(stats_ptr + part * 2 + 1, whole, mask=g < GROUP)
            tl.debug_barrier()
            complete = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == count - 1
            if complete:
                tl.store(arrived, 0)
                total, whole = _merge(sums_ptr, stats_ptr, parts, KV * GROUP, count, GROUP, D)
        if complete:
            tl.store(out_ptr + at, (total / whole[:, None]).to(out_ptr.dtype.element_ty), mask=mine)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lens: Tensor, page: int, scale: float, window: int,
    shape: Shape, arrived: Tensor, longest: int, span: int,
) -> Tensor:  # fmt: skip
    """q [n, H, D] over the last ``window`` (0: all) of each request's ``lens`` tokens, at least one -> like q.

    Args:
        keys, values: of a layer, [rows, heads, D]. All are finite: rows beyond a request's end are multiplied by zero.
        tables: int32 [n, P], the blocks of each request. page: tokens of a block, a multiple of the largest tile.
        arrived: int32 [n, heads] of zeros, and is left so.
        longest: tokens that are seen of a request, at most; with a window a page more than it.
        span: of them that one program reads, a multiple of the largest tile.
    """
    (n, q_heads, dim), heads = q.shape, keys.shape[1]
    assert q.is_contiguous() and q_heads // heads <= HEADS and not page % 64, (q.shape, heads, page)
    out = torch.empty_like(q)
    most = -(-longest // span)
    further = min(n * (most - 1), -(-FURTHER // heads))
    kept = (n * most * q_heads if most > 1 else 0,)
    sums, stats = (torch.empty(*kept, width, dtype=torch.float32, device=q.device) for width in (dim, 2))

    def tiles(cache: Tensor) -> TensorDescriptor:
        return TensorDescriptor(cache, [len(cache), heads * dim], [heads * dim, 1], [shape.tile, dim])

    _decode_kernel[(heads, n + further)](
        q, tiles(keys), tiles(values), out, sums, stats, arrived, tables, lens, n, tables.stride(0),
        scale / math.log(2), window, span, most, KV=heads, GROUP=q_heads // heads, HEADS=HEADS, D=dim, PAGE=page,
        TILE=shape.tile, WINDOW=window > 0, PARTS=most > 1,
        REQUESTS=max(256, triton.next_power_of_2(n)) if most > 1 else 1,
        num_stages=shape.stages, num_warps=shape.warps,
    )  # fmt: skip
    return out
