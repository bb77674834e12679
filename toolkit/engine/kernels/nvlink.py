"""Rows of a decode step written into the memory of the other GPUs of a host, and their results written back.

Four kernels a round, in stream order on every rank:

- ``push`` writes each row, with its slots and weights, to the ranks that hold one of its slots, and signals.
- ``place`` waits for the signals of all ranks and copies the rows slot by slot, as grouped GEMMs read them.
- ``give_back`` sums each received row's results, weighted, writes the sum to the row's own rank, and signals.
- ``total`` waits for those and adds up what the ranks sent.

A signal counter is never reset: a wait is for a number that grows with the round, which lives on the GPU, so that a
CUDA graph can replay. One buffer is enough. A peer's next ``push`` comes after its ``total``, which waited for this
rank's ``give_back``; and its next ``give_back`` after its ``place``, which waited for this rank's next ``push``.
N ranks, S rows of each, K top-k, D columns, e slots of a rank, R placed rows. Offsets of rows fit 32 bits: decode
steps have few. Read next: ``moe/nvlink.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.rows import column_major

PUSHERS, GIVERS = 64, 128  # programs, and so signals, of a rank for each destination
LINE = tl.constexpr(128)  # bytes between counters
SPINS = tl.constexpr(1 << 30)  # looks at a counter, tens of minutes, until a rank that waits for a dead one gives up


@dataclass(frozen=True)
class Window:
    """This rank's view of the buffers that all ranks have, laid out alike.

    Attributes:
        peers: int64 [N], the address of each rank's buffer, own included.
        rounds: int32 [2], the number of the next dispatch and of the combine under way, from 1.
        x, scales, ids, weights, back, signals: where each part begins, bytes.
    """

    peers: Tensor
    rounds: Tensor
    rank: int
    x: int
    scales: int
    ids: int
    weights: int
    back: int
    signals: int


@triton.jit
def _part(peers_ptr, rank, offset, dtype: tl.constexpr):
    """A pointer into a part of a rank's buffer; parts begin at multiples of 16 bytes."""
    address = tl.load(peers_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _signal(peers_ptr, to, signals, counter):
    """Everything this program wrote is visible to whoever sees the counter grow."""
    tl.debug_barrier()
    tl.atomic_add(_part(peers_ptr, to, signals + counter * LINE, tl.int32), 1, sem="release", scope="sys")


@triton.jit
def _wait(peers_ptr, rank, signals, first, N: tl.constexpr, wanted):
    """Until counters ``first`` .. ``first + N - 1`` have reached ``wanted``, which wraps as they do."""
    for source in range(N):
        counter = _part(peers_ptr, rank, signals + (first + source) * LINE, tl.int32)
        spins = 0
        while (tl.load(counter, volatile=True) - wanted < 0) & (spins < SPINS):
            spins += 1
        if spins >= SPINS:
            tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [spins], dtype=tl.int32, is_pure=False, pack=1)
        tl.atomic_add(counter, 0, sem="acquire", scope="sys")


@triton.jit(do_not_specialize=["rows", "step_rows", "rank"])
def _push_kernel(
    x_ptr, scales_ptr, slots_ptr, weights_ptr, peers_ptr, rounds_ptr, rows, step_rows, rank,
    x_at, scales_at, ids_at, weights_at, signals, e,
    D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
):  # fmt: skip
    to = tl.program_id(1)
    if (tl.program_id(0) == 0) & (to == 0):
        tl.store(rounds_ptr + 1, tl.load(rounds_ptr + 1) + 1)
    x_out = _part(peers_ptr, to, x_at, x_ptr.dtype.element_ty)
    ids_out = _part(peers_ptr, to, ids_at, tl.int32)
    weights_out = _part(peers_ptr, to, weights_at, tl.float32)
    k = tl.arange(0, K_BLOCK)
    for row in range(tl.program_id(0), step_rows, tl.num_programs(0)):
        at = rank * step_rows + row
        slots = tl.load(slots_ptr + row * K + k, mask=(k < K) & (row < rows), other=-1).to(tl.int32)
        tl.store(ids_out + at * K + k, slots, mask=k < K)
        if tl.max(((slots >= to * e) & (slots < (to + 1) * e)).to(tl.int32), 0) > 0:
            weights = tl.load(weights_ptr + row * K + k, mask=k < K, other=0.0)
            tl.store(weights_out + at * K + k, weights, mask=k < K)
            for first in tl.static_range(0, D, BLOCK):
                d = first + tl.arange(0, BLOCK)
                tl.store(x_out + at * D + d, tl.load(x_ptr + row * D + d, mask=d < D), mask=d < D)
            if G > 0:
                g = tl.arange(0, G_BLOCK)
                scales_out = _part(peers_ptr, to, scales_at, tl.float32)
                tl.store(scales_out + at * G + g, tl.load(scales_ptr + row * G + g, mask=g < G), mask=g < G)
    _signal(peers_ptr, to, signals, rank)


@triton.jit(do_not_specialize=["step_rows", "rank", "scales_stride"])
def _place_kernel(
    out_ptr, out_scales_ptr, rows_ptr, counts_ptr, ends_ptr, peers_ptr, rounds_ptr, step_rows, rank,
    x_at, scales_at, ids_at, signals, scales_stride, e,
    N: tl.constexpr, SIGNALS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr, PAIRS: tl.constexpr, SLOTS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One program a received row. Each counts all slots for itself: cheaper than another kernel, and always alike."""
    token = tl.program_id(0)
    _wait(peers_ptr, rank, signals, 0, N, tl.load(rounds_ptr) * SIGNALS)
    x = _part(peers_ptr, rank, x_at, out_ptr.dtype.element_ty)
    ids_in = _part(peers_ptr, rank, ids_at, tl.int32)
    pair = tl.arange(0, PAIRS)
    local = tl.load(ids_in + pair, mask=pair < N * step_rows * K, other=-1) - rank * e
    mine = (local >= 0) & (local < e)
    slots = tl.arange(0, SLOTS)
    counts = tl.histogram(tl.where(mine, local, 0), SLOTS, mask=mine)
    padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    starts = tl.cumsum(padded, 0) - padded
    if token == 0:
        tl.store(counts_ptr + slots, counts, mask=slots < e)
        tl.store(ends_ptr + slots, starts + counts, mask=slots < e)
    for k in tl.static_range(K):
        slot = tl.load(ids_in + token * K + k) - rank * e
        row = tl.full((), -1, tl.int64)
        if (slot >= 0) & (slot < e):
            before = tl.sum(((local == slot) & (pair < token * K + k)).to(tl.int32), 0)
            row = (tl.sum(tl.where(slots == slot, starts, 0), 0) + before).to(tl.int64)
            for first in tl.static_range(0, D, BLOCK):
                d = first + tl.arange(0, BLOCK)
                value = tl.load(x + token * D + d, mask=d < D)
                tl.store(out_ptr + row * D + d, value, mask=d < D)
            if G > 0:
                g = tl.arange(0, G_BLOCK)
                scales = _part(peers_ptr, rank, scales_at, tl.float32)
                scale = tl.load(scales + token * G + g, mask=g < G)
                tl.store(out_scales_ptr + g * scales_stride + row, scale, mask=g < G)
        tl.store(rows_ptr + token * K + k, row)


@triton.jit(do_not_specialize=["step_rows", "rank"])
def _give_back_kernel(
    y_ptr, rows_ptr, peers_ptr, rounds_ptr, step_rows, rank, weights_at, back_at, signals,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    to = tl.program_id(1)
    if (tl.program_id(0) == 0) & (to == 0):
        tl.store(rounds_ptr, tl.load(rounds_ptr) + 1)
    weights = _part(peers_ptr, rank, weights_at, tl.float32)
    back = _part(peers_ptr, to, back_at, y_ptr.dtype.element_ty)
    for s in range(tl.program_id(0), step_rows, tl.num_programs(0)):
        token = to * step_rows + s
        mine = tl.full((), 0, tl.int32)
        for k in tl.static_range(K):
            mine += (tl.load(rows_ptr + token * K + k) >= 0).to(tl.int32)
        if mine > 0:
            for first in tl.static_range(0, D, BLOCK):
                d = first + tl.arange(0, BLOCK)
                total = tl.zeros((BLOCK,), tl.float32)
                for k in tl.static_range(K):
                    row = tl.load(rows_ptr + token * K + k)
                    if row >= 0:
                        weight = tl.load(weights + token * K + k)
                        total += weight * tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
                at = rank * step_rows + s
                tl.store(back + at * D + d, total.to(y_ptr.dtype.element_ty), mask=d < D)
    _signal(peers_ptr, to, signals, N + rank)


@triton.jit(do_not_specialize=["rows", "step_rows", "rank"])
def _total_kernel(
    out_ptr, slots_ptr, peers_ptr, rounds_ptr, rows, step_rows, rank, back_at, signals, e,
    N: tl.constexpr, SIGNALS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    _wait(peers_ptr, rank, signals, N, N, tl.load(rounds_ptr + 1) * SIGNALS)
    row = tl.program_id(0)
    if row < rows:
        back = _part(peers_ptr, rank, back_at, out_ptr.dtype.element_ty)
        k = tl.arange(0, K_BLOCK)
        slots = tl.load(slots_ptr + row * K + k, mask=k < K, other=-1).to(tl.int32)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(N):
            if tl.max(((slots >= source * e) & (slots < (source + 1) * e)).to(tl.int32), 0) > 0:
                at = source * step_rows + row
                total += tl.load(back + at * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def push(w: Window, x: Tensor, scales: Tensor | None, slots: Tensor, weights: Tensor, step_rows: int, e: int) -> None:
    """Rows x [S, D], FP8 with ``scales`` [S, D / 128] or not, to the ranks of their ``slots`` int64 [S, K].

    Args:
        step_rows: of the rank that has most.
        e: slots of a rank.
    """
    rows, columns = x.shape
    top_k = slots.shape[1]
    groups = 0 if scales is None else scales.shape[1]
    _push_kernel[(PUSHERS, len(w.peers))](
        x.view(torch.int8) if scales is not None else x, x if scales is None else scales, slots, weights, w.peers,
        w.rounds, rows, step_rows, w.rank, w.x, w.scales, w.ids, w.weights, w.signals, e,
        D=columns, G=groups, K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=_block(columns),
        G_BLOCK=triton.next_power_of_2(max(groups, 1)), num_warps=4,
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
    _place_kernel[(tokens,)](
        out.view(torch.int8) if groups else out, out if scales is None else scales, rows, counts, ends, w.peers,
        w.rounds, step_rows, w.rank, w.x, w.scales, w.ids, w.signals, 0 if scales is None else scales.stride(1), e,
        N=ranks, SIGNALS=PUSHERS, D=columns, G=groups, K=top_k, BLOCK=_block(columns),
        G_BLOCK=triton.next_power_of_2(max(groups, 1)), PAIRS=pairs, SLOTS=triton.next_power_of_2(e),
        ALIGNMENT=alignment, num_warps=4 if pairs <= 4096 else 8,
    )  # fmt: skip
    return out, scales, rows, counts, ends


def give_back(w: Window, y: Tensor, rows: Tensor, step_rows: int) -> None:
    """Each received row's weighted sum over its placed results y [R, D], to the rank it came from."""
    columns, ranks = y.shape[1], len(w.peers)
    _give_back_kernel[(GIVERS, ranks)](
        y, rows, w.peers, w.rounds, step_rows, w.rank, w.weights, w.back, w.signals,
        N=ranks, D=columns, K=rows.shape[1], BLOCK=min(_block(columns), 1024), num_warps=4,
    )  # fmt: skip


def total(w: Window, slots: Tensor, columns: int, dtype: torch.dtype, step_rows: int, e: int) -> Tensor:
    """[S, D]: what the ranks of each row's ``slots`` gave back. A rank without rows waits too."""
    rows, top_k = slots.shape
    out = torch.empty(rows, columns, dtype=dtype, device=slots.device)
    block, ranks = min(_block(columns), 1024), len(w.peers)
    _total_kernel[(max(rows, 1), triton.cdiv(columns, block))](
        out, slots, w.peers, w.rounds, rows, step_rows, w.rank, w.back, w.signals, e,
        N=ranks, SIGNALS=GIVERS, D=columns, K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _block(columns: int) -> int:
    return min(1 << (columns - 1).bit_length(), 2048)
