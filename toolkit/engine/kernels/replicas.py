"""Triton kernels of the weighted choice of replicas: a batch is counted, levelled over the GPUs, and sent; no host.

``toolkit/engine/eplb/weighted.py`` has the same arithmetic for the host, and says what it minimises. A decode step's
layer is one launch: each program counts the whole batch and levels it for itself, which gives all the same split, and
sends its own assignments, in order, so that the same batch always goes the same ways. Of more than ``FEW`` assignments,
tiles are counted in a launch of their own. What a placement decides is in a row of ``eplb/packed.py``.
N: assignments, B: tiles of them, E: experts, F: windows, X: places of a window, P: F x X, G: GPUs, H: places of a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow

if TYPE_CHECKING:
    from toolkit.engine.eplb.packed import Layout

TILE, FEW = 1024, 4096
TILES = 16  # whose counts are summed at a time


# Sizes that change from step to step are not specialised: a new one must never be compiled while requests wait.
@triton.jit(do_not_specialize=["N"])
def _count_kernel(
    ids_ptr, bin_ptr, counts_ptr, N, E: tl.constexpr, ROOM: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, ROOM)
    bin_E = tl.load(bin_ptr + e, mask=e < E, other=0)
    follow(PDL)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    counts = _counts(ids_ptr, bin_E, i, N, BINS)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _counts(ids_ptr, bin_E, i, N, BINS: tl.constexpr):
    """Assignments of each bin among ``i`` below ``N``."""
    ids = tl.load(ids_ptr + i, mask=i < N, other=-1).to(tl.int32)
    return tl.histogram(tl.gather(bin_E, tl.maximum(ids, 0), 0), BINS, mask=ids >= 0)


@triton.jit
def _total(
    ids_ptr, bin_E, counts_ptr, N, B, start, BINS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """Assignments of each bin: of the batch, and of the part before ``start``."""
    t = tl.arange(0, TILE)
    mine = start // TILE
    total = tl.zeros([BINS], tl.int32)
    before = _counts(ids_ptr, bin_E, mine * TILE + t, start, BINS)
    if COUNTED:
        for first in range(0, B, TILES):
            b = first + tl.arange(0, TILES)[:, None]
            counts = tl.load(counts_ptr + b * BINS + tl.arange(0, BINS)[None, :], mask=b < B, other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where(b < mine, counts, 0), 0)
    else:
        for tile in range(B):
            counts = _counts(ids_ptr, bin_E, tile * TILE + t, N, BINS)
            total += counts
            before += tl.where(tile < mine, counts, 0)
    return total, before


@triton.jit
def _level(
    total, base_G, bin_F, gpu_P, held_GH, part_F, ahead_F, inverse_F, even_FX, smooth_GG, rounds,
    P: tl.constexpr, F: tl.constexpr, X: tl.constexpr, G: tl.constexpr, H: tl.constexpr, STIFF: tl.constexpr,
    STRIDE: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Assignments of its expert before each place, [P]; see ``eplb/weighted.py``, ``_level``."""
    on_FX = tl.where(tl.reshape(gpu_P, [F, X]) >= 0, 1.0, 0.0)
    at_P, at_GH, held = tl.maximum(gpu_P, 0), tl.maximum(held_GH, 0), tl.reshape(held_GH, [G, H]) >= 0
    expert_F = tl.gather(total, bin_F, 0).to(tl.float32)
    total_F = expert_F * part_F
    share = even_FX * expert_F[:, None]
    for _ in range(rounds):
        given = tl.abs(share)
        given += on_FX * ((total_F - tl.sum(given, 1)) * inverse_F)[:, None]
        there = tl.reshape(tl.gather(tl.reshape(given, [P]), at_GH, 0), [G, H])
        sum_G = base_G + tl.sum(tl.where(held, there, 0.0), 1)
        load_G = tl.sum(smooth_GG * sum_G[None, :], 1)
        load_FX = on_FX * tl.reshape(tl.gather(load_G, at_P, 0), [F, X])
        mean = tl.sum(load_FX, 1) * inverse_F
        share += STRIDE * (given + (on_FX * mean[:, None] - load_FX) / STIFF - tl.maximum(share, 0.0))
    share = tl.maximum(share, 0.0)
    share *= (total_F / tl.maximum(tl.sum(share, 1), 1e-6))[:, None]
    before = tl.cumsum(share, 1) - share + (expert_F * ahead_F)[:, None]
    return tl.reshape(tl.floor(before + UP).to(tl.int32), [P])


@triton.jit(do_not_specialize=["N", "B"])
def _choose_kernel(
    ids_ptr, counts_ptr, ints_ptr, floats_ptr, out_ptr, N, B, E: tl.constexpr, ROOM: tl.constexpr, F: tl.constexpr,
    X: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BINS: tl.constexpr, STIFF: tl.constexpr, STRIDE: tl.constexpr,
    UP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = F * X
    e = tl.arange(0, ROOM)
    bin_E = tl.load(ints_ptr + e, mask=e < E, other=0)
    at_E = tl.load(ints_ptr + E + e, mask=e < E, other=0)
    count_E = tl.load(ints_ptr + 2 * E + e, mask=e < E, other=1)
    f, p, g, h = tl.arange(0, F), tl.arange(0, P), tl.arange(0, G), tl.arange(0, G * H)
    bins_ptr = ints_ptr + 3 * E  # the parts of the row, as ``eplb/packed.py`` puts them together
    bin_F, gpu_P, slot_P = tl.load(bins_ptr + f), tl.load(bins_ptr + F + p), tl.load(bins_ptr + F + P + p)
    held_GH = tl.load(bins_ptr + F + 2 * P + h)
    parts_ptr = floats_ptr + 3 * E + F + 2 * P + G * H
    part_F, ahead_F, inverse_F = tl.load(parts_ptr + f), tl.load(parts_ptr + F + f), tl.load(parts_ptr + 2 * F + f)
    even_FX = tl.reshape(tl.load(parts_ptr + 3 * F + p), [F, X])
    smooth_GG = tl.load(parts_ptr + 3 * F + P + g[:, None] * G + g[None, :])
    rounds = tl.load(ints_ptr + 3 * E + 4 * F + 3 * P + G * (H + G))
    follow(PDL)  # only the batch is of the kernels before

    start = tl.program_id(0) * BLOCK
    total, before = _total(ids_ptr, bin_E, counts_ptr, N, B, start, BINS, TILE, TILES, COUNTED)
    base_G = tl.gather(total, g, 0).to(tl.float32)
    begin_P = _level(
        total, base_G, bin_F, gpu_P, held_GH, part_F, ahead_F, inverse_F, even_FX, smooth_GG, rounds, P, F, X, G, H,
        STIFF, STRIDE, UP,
    )  # fmt: skip

    r = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + start + r, mask=start + r < N, other=-1).to(tl.int32)
    again = tl.load(ids_ptr + start + r, mask=start + r < N, other=-1).to(tl.int32)
    expert = tl.maximum(ids, 0)
    rank = tl.sum(tl.where((ids[:, None] == again[None, :]) & (r[None, :] < r[:, None]), 1, 0), 1)
    rank += tl.gather(before, tl.gather(bin_E, expert, 0), 0)
    count = tl.where(ids >= 0, tl.gather(count_E, expert, 0), 1)
    at = tl.gather(at_E, expert, 0)
    slot = tl.where(count > 1, _replica(begin_P, slot_P, tl.where(count > 1, at, 0), count, rank, P), at)
    tl.store(out_ptr + start + r, tl.where(ids >= 0, slot, -1).to(tl.int64), mask=start + r < N)


@triton.jit
def _replica(begin_P, slot_P, at, count, rank, P: tl.constexpr):
    """The slot at the last of ``count`` places from ``at`` on that begins at ``rank`` or before it, found by halves."""
    most = tl.max(count, 0)
    half = 1
    while 2 * half < most:
        half *= 2
    while half > 0:
        begin = tl.gather(begin_P, tl.minimum(at + half, P - 1), 0)
        further = (half < count) & (begin <= rank)
        at += tl.where(further, half, 0)
        count -= tl.where(further, half, 0)
        half //= 2
    return tl.gather(slot_P, at, 0)


def weighted_slots(ids: Tensor, row: Tensor, layout: Layout, stiff: float, stride: float, up: float) -> Tensor:
    """Slots of the assignments ``ids`` [S, K], levelled over the GPUs; -1 stays -1.

    Args:
        row: int32, the placement's, of this ``layout``.
        stiff, stride, up: of the levelling and its rounding, as in ``eplb/weighted.py``.
    """
    flat = ids.contiguous()
    count = flat.numel()
    out = torch.empty_like(flat)
    if not count:
        return out
    few, tiles, block = count <= FEW, triton.cdiv(count, TILE), 64 if count <= FEW else 128
    sizes = {"E": layout.experts, "ROOM": layout.room, "BINS": layout.bins, "TILE": TILE} | chained(len(ids))
    counts = row  # which is not read, where programs count for themselves
    if not few:
        counts = torch.empty(tiles, layout.bins, dtype=torch.int32, device=ids.device)
        _count_kernel[(tiles,)](flat, row, counts, count, **sizes, num_warps=4)
    _choose_kernel[(triton.cdiv(count, block),)](
        flat, counts, row, row.view(torch.float32), out, count, tiles, F=layout.windows, X=layout.width, G=layout.gpus,
        H=layout.holds, STIFF=stiff, STRIDE=stride, UP=up, TILES=TILES, BLOCK=block, COUNTED=not few, **sizes,
        num_warps=4 if few and layout.gpus <= 32 else 8,
    )  # fmt: skip
    return out
