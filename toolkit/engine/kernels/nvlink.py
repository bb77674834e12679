"""Rows of a decode step written into the memory of the other GPUs of a host, and their results written back.

Four kernels a round, in stream order on every rank:

- ``push`` writes each row, with its slots and weights, to the ranks that hold one of its slots, and signals.
- ``place`` waits for the signals of all ranks and copies the rows slot by slot, as grouped GEMMs read them.
- ``give_back`` sums each received row's results, weighted, writes the sum to the row's own rank, and signals.
- ``total`` waits for those and adds up what the ranks sent; on demand it goes on to the next layer's norm.

One buffer is enough. A peer's next ``push`` comes after its ``total``, which waited for this rank's ``give_back``; and
its next ``give_back`` after its ``place``, which waited for this rank's next ``push``. Here are the first two.
N ranks, S rows of each, K top-k, D columns, e slots of a rank, R placed rows. Offsets of rows fit 32 bits: decode
steps have few. Read next: ``nvlink_back.py``, ``moe/nvlink.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow
from toolkit.engine.kernels.rows import column_major
from toolkit.engine.kernels.signals import Window, block, few, part, programs, signal, wait

PLACERS = 128  # programs, about one for each of an H100's 132 multiprocessors


@triton.jit(do_not_specialize=["rows", "step_rows", "rank"])
def _push_kernel(
    x_ptr, scales_ptr, slots_ptr, weights_ptr, peers_ptr, rounds_ptr, done_ptr, rows, step_rows, rank,
    x_at, scales_at, ids_at, weights_at, signals, e,
    D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    to = tl.program_id(1)
    if (tl.program_id(0) == 0) & (to == 0):
        tl.store(rounds_ptr + 1, tl.load(rounds_ptr + 1) + 1)
    x_out = part(peers_ptr, to, x_at, x_ptr.dtype.element_ty)
    ids_out = part(peers_ptr, to, ids_at, tl.int32)
    weights_out = part(peers_ptr, to, weights_at, tl.float32)
    k = tl.arange(0, K_BLOCK)
    for row in range(tl.program_id(0), step_rows, tl.num_programs(0)):
        # masks instead of branches: all loads are under way before one of them is waited for
        at, real = rank * step_rows + row, tl.zeros((1,), tl.int32) + row < rows
        slots = tl.load(slots_ptr + row * K + k, mask=(k < K) & real, other=-1).to(tl.int32)
        weights = tl.load(weights_ptr + row * K + k, mask=(k < K) & real, other=0.0)
        sent = tl.max(((slots >= to * e) & (slots < (to + 1) * e)).to(tl.int32), 0, keep_dims=True) > 0
        for first in tl.static_range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            value = tl.load(x_ptr + row * D + d, mask=(d < D) & real)
            tl.store(x_out + at * D + d, value, mask=(d < D) & sent)
        if G > 0:
            g = tl.arange(0, G_BLOCK)
            scales_out = part(peers_ptr, to, scales_at, tl.float32)
            scale = tl.load(scales_ptr + row * G + g, mask=(g < G) & real)
            tl.store(scales_out + at * G + g, scale, mask=(g < G) & sent)
        tl.store(ids_out + at * K + k, slots, mask=k < K)
        tl.store(weights_out + at * K + k, weights, mask=(k < K) & sent)
    signal(peers_ptr, to, signals, rank, done_ptr + to, FEW)


@triton.jit(do_not_specialize=["step_rows", "rank", "scales_stride"])
def _place_kernel(
    out_ptr, out_scales_ptr, rows_ptr, counts_ptr, ends_ptr, peers_ptr, rounds_ptr, step_rows, rank,
    x_at, scales_at, ids_at, signals, scales_stride, e,
    N: tl.constexpr, N_BLOCK: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, G_BLOCK: tl.constexpr, PAIRS: tl.constexpr, SLOTS: tl.constexpr, ALIGNMENT: tl.constexpr,
    TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOKENS received rows a program. Each counts all slots for itself: cheaper than another kernel, always alike."""
    follow(PDL)
    first = tl.program_id(0) * TOKENS
    wait(peers_ptr, rank, signals, 0, tl.load(rounds_ptr), N, N_BLOCK)
    x = part(peers_ptr, rank, x_at, out_ptr.dtype.element_ty)
    ids_in = part(peers_ptr, rank, ids_at, tl.int32)
    token = first + tl.arange(0, TOKENS)
    here, d = (token < N * step_rows)[:, None], tl.arange(0, BLOCK)[None, :]
    head = tl.load(x + token[:, None] * D + d, mask=here & (d < D))  # under way while slots are counted
    pair = tl.arange(0, PAIRS)
    local = tl.load(ids_in + pair, mask=pair < N * step_rows * K, other=-1) - rank * e
    mine = (local >= 0) & (local < e)
    slots, bins = tl.arange(0, SLOTS), tl.where(mine, local, 0)
    before = tl.histogram(bins, SLOTS, mask=mine & (pair < first * K))
    counts = before + tl.histogram(bins, SLOTS, mask=mine & (pair >= first * K))
    padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    starts = tl.cumsum(padded, 0) - padded
    if first == 0:
        tl.store(counts_ptr + slots, counts, mask=slots < e)
        tl.store(ends_ptr + slots, starts + counts, mask=slots < e)
    # the pairs of this program: after those of earlier programs, then in order
    own = tl.arange(0, TOKENS * K_BLOCK)
    at = (first + own // K_BLOCK) * K + own % K_BLOCK
    real = (own % K_BLOCK < K) & (first + own // K_BLOCK < N * step_rows)
    slot = tl.load(ids_in + at, mask=real, other=-1) - rank * e
    slot = tl.where((slot >= 0) & (slot < e), slot, -1)
    ahead = tl.sum(((slot[:, None] == slot[None, :]) & (own[None, :] < own[:, None])).to(tl.int32), 1)
    base = tl.sum(tl.where(slot[:, None] == slots[None, :], (starts + before)[None, :], 0), 1)
    placed = tl.where(slot >= 0, base + ahead, -1).to(tl.int64)
    tl.store(rows_ptr + at, placed, mask=real)
    placed, choice = tl.reshape(placed, (TOKENS, K_BLOCK)), tl.arange(0, K_BLOCK)[None, :]
    for column in tl.static_range(0, D, BLOCK):
        inside = column + d < D
        value = head if column == 0 else tl.load(x + token[:, None] * D + column + d, mask=here & inside)
        for k in tl.static_range(K):
            row = tl.sum(tl.where(choice == k, placed, 0), 1)[:, None]
            tl.store(out_ptr + row * D + column + d, value, mask=inside & here & (row >= 0))
    if G > 0:
        g = tl.arange(0, G_BLOCK)[None, :]
        scales = part(peers_ptr, rank, scales_at, tl.float32)
        scale = tl.load(scales + token[:, None] * G + g, mask=here & (g < G))
        for k in tl.static_range(K):
            row = tl.sum(tl.where(choice == k, placed, 0), 1)[:, None]
            tl.store(out_scales_ptr + g * scales_stride + row, scale, mask=here & (g < G) & (row >= 0))


def push(w: Window, x: Tensor, scales: Tensor | None, slots: Tensor, weights: Tensor, step_rows: int, e: int) -> None:
    """Rows x [S, D], FP8 with ``scales`` [S, D / 128] or not, to the ranks of their ``slots`` int64 [S, K].

    Args:
        step_rows: of the rank that has most.
        e: slots of a rank.
    """
    rows, columns = x.shape
    top_k = slots.shape[1]
    groups = 0 if scales is None else scales.shape[1]
    _push_kernel[(programs(step_rows), len(w.peers))](
        x.view(torch.int8) if scales is not None else x, x if scales is None else scales, slots, weights, w.peers,
        w.rounds, w.done, rows, step_rows, w.rank, w.x, w.scales, w.ids, w.weights, w.signals, e,
        D=columns, G=groups, K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=block(columns),
        G_BLOCK=triton.next_power_of_2(max(groups, 1)), FEW=few(step_rows), num_warps=4, **chained(step_rows),
    )  # fmt: skip


def place(
    w: Window, like: Tensor, groups: int, top_k: int, step_rows: int, e: int, alignment: int, room: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Received rows, of the type and width of ``like``, slot by slot.

    Args:
        groups: columns of the rows' scales; 0: none.
        room: R, at least the rows that any routing needs.

    Returns:
        placed rows [R, D], their scales (column-major), rows [N S, K] (-1: nowhere), counts and ends [e] int32.
    """
    ranks, columns = len(w.peers), like.shape[1]
    tokens = ranks * step_rows
    out = like.new_empty(room, columns)
    scales = column_major((room, groups), like.device) if groups else None
    rows = torch.empty(tokens, top_k, dtype=torch.int64, device=like.device)
    counts = torch.empty(e, dtype=torch.int32, device=like.device)
    ends = torch.empty_like(counts)
    if not tokens:
        return out, scales, rows, counts.zero_(), ends.zero_()
    pairs = triton.next_power_of_2(tokens * top_k)
    together = min(triton.next_power_of_2(triton.cdiv(tokens, PLACERS)), 8)
    _place_kernel[(triton.cdiv(tokens, together),)](
        out.view(torch.int8) if groups else out, out if scales is None else scales, rows, counts, ends, w.peers,
        w.rounds, step_rows, w.rank, w.x, w.scales, w.ids, w.signals, 0 if scales is None else scales.stride(1), e,
        N=ranks, N_BLOCK=triton.next_power_of_2(ranks), D=columns, G=groups, K=top_k,
        K_BLOCK=triton.next_power_of_2(top_k), BLOCK=block(columns),
        G_BLOCK=triton.next_power_of_2(max(groups, 1)), PAIRS=pairs, SLOTS=triton.next_power_of_2(e),
        ALIGNMENT=alignment, TOKENS=together, num_warps=4 if pairs <= 1024 else 8, **chained(step_rows),
    )  # fmt: skip
    return out, scales, rows, counts, ends
