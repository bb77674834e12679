"""Triton kernels of the weighted choice of replicas: a batch is counted, levelled over the GPUs, and sent; no host.

``toolkit/engine/eplb/weighted.py`` has the same arithmetic for the host, and says what it minimises. Three launches:
blocks of assignments are counted; one program sums them and splits each replicated expert's tokens, all experts at
once; blocks give their assignments to replicas in order, so that the same batch always goes the same ways.
N: assignments, B: blocks of them, E: experts, W: rows of the table of replicas (padded).
Read next: ``toolkit/engine/eplb/replicas.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # assignments of a program: each is compared with those before it
TILE = 16  # blocks whose counts are summed at a time
HUGE = 2**30


# Sizes that change from step to step are not specialised: a new one must never be compiled while requests wait.
@triton.jit(do_not_specialize=["N"])
def _count_kernel(ids_ptr, counts_ptr, N, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < N, other=-1).to(tl.int32)
    counts = tl.histogram(tl.where(ids < 0, E, ids), BINS)  # padding into a bin that nobody reads
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["B"])
def _level_kernel(
    counts_ptr, only_ptr, expert_ptr, gpu_ptr, begin_ptr, B, E, local, ROUNDS: tl.constexpr,
    BINS: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Counts become the assignments before each block; ``begin``: before each replica, of its expert's."""
    e, w = tl.arange(0, BINS), tl.arange(0, W)
    total_e = tl.zeros([BINS], tl.int32)
    for first in range(0, B, TILE):
        b = first + tl.arange(0, TILE)
        where = b[:, None] * BINS + e[None, :]
        counts = tl.load(counts_ptr + where, mask=(b < B)[:, None], other=0)
        before = tl.cumsum(counts, 0) - counts + total_e[None, :]
        tl.store(counts_ptr + where, before, mask=(b < B)[:, None])
        total_e += tl.sum(counts, 0)
    expert, gpu = tl.load(expert_ptr + w), tl.load(gpu_ptr + w)
    slot_e = tl.load(only_ptr + e, mask=e < E, other=-1)  # of experts with one
    gpu_e = tl.where(slot_e >= 0, slot_e // local, -1)
    base = tl.sum(tl.where(gpu[:, None] == gpu_e[None, :], total_e[None, :], 0), 1).to(tl.float32)
    total = tl.sum(tl.where(expert[:, None] == e[None, :], total_e[None, :], 0), 1).to(tl.float32)
    family = expert[:, None] == expert[None, :]
    real = (expert >= 0)[None, :]
    beside = (gpu[:, None] == gpu[None, :]) & real
    crowd = tl.sum(tl.where(beside, 1, 0), 1)
    step = 1.0 / tl.max(tl.where(family, crowd[None, :], 1), 1).to(tl.float32)
    share = total / tl.sum(tl.where(family, 1, 0), 1).to(tl.float32)
    previous = share
    for turn in range(ROUNDS):
        momentum = turn / (turn + 3.0)
        ahead = share + momentum * (share - previous)
        load = base + tl.sum(tl.where(beside, ahead[None, :], 0.0), 1)
        moved = ahead - step * load
        # onto the simplex: of the cuts that rows at least as large as each would have, the highest is the one
        above = family & (moved[None, :] >= moved[:, None])
        cut = (tl.sum(tl.where(above, moved[None, :], 0.0), 1) - total) / tl.sum(tl.where(above, 1.0, 0.0), 1)
        cut = tl.max(tl.where(family, cut[None, :], -float("inf")), 1)
        previous = share
        share = tl.maximum(moved - cut, 0.0)
    earlier = family & (w[None, :] < w[:, None])
    begin = tl.floor(tl.sum(tl.where(earlier, share[None, :], 0.0), 1) + 0.5)
    tl.store(begin_ptr + w, begin.to(tl.int32))


@triton.jit(do_not_specialize=["N"])
def _choose_kernel(
    ids_ptr, before_ptr, only_ptr, first_ptr, count_ptr, slot_ptr, begin_ptr, out_ptr, N,
    BINS: tl.constexpr, BLOCK: tl.constexpr, HUGE: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + r
    ids = tl.load(ids_ptr + i, mask=i < N, other=-1).to(tl.int32)
    again = tl.load(ids_ptr + tl.program_id(0) * BLOCK + r, mask=i < N, other=-1).to(tl.int32)
    earlier = (ids[:, None] == again[None, :]) & (r[None, :] < r[:, None])
    real = (i < N) & (ids >= 0)
    rank = tl.sum(tl.where(earlier, 1, 0), 1)
    rank += tl.load(before_ptr + tl.program_id(0) * BINS + ids, mask=real, other=0)
    slot = tl.load(only_ptr + ids, mask=real, other=-1)
    first = tl.load(first_ptr + ids, mask=real, other=0)
    count = tl.load(count_ptr + ids, mask=real, other=0)
    several = real & (slot < 0)
    for x in range(tl.max(tl.where(several, count, 0), 0)):
        begin = tl.load(begin_ptr + first + x, mask=several & (x < count), other=HUGE)
        found = tl.load(slot_ptr + first + x, mask=several & (x < count), other=-1)
        slot = tl.where(begin <= rank, found, slot)
    tl.store(out_ptr + i, slot.to(tl.int64), mask=i < N)


def weighted_slots(ids: Tensor, table: Tensor, experts: int, local: int, rounds: int) -> Tensor:
    """Slots of the assignments ``ids`` [...], levelled over the GPUs; -1 stays -1.

    Args:
        table: int32, one after the other: of each expert its slot if it has one (else -1), the row of its first
            replica and their number; of each row expert, GPU (both -1 where there is none) and slot.
        experts: E. local: slots of a GPU. rounds: of the levelling.
    """
    flat = ids.contiguous()
    count, rows = flat.numel(), (len(table) - 3 * experts) // 3
    out = torch.empty_like(flat)
    if not count:
        return out
    only, first, number = table[: 3 * experts].view(3, experts).unbind(0)
    expert, gpu, slot = table[3 * experts :].view(3, rows).unbind(0)
    blocks, bins = triton.cdiv(count, BLOCK), triton.next_power_of_2(experts + 1)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=ids.device)
    begin = torch.empty(rows, dtype=torch.int32, device=ids.device)
    _count_kernel[(blocks,)](flat, counts, count, experts, BINS=bins, BLOCK=BLOCK, num_warps=4)
    _level_kernel[(1,)](
        counts, only, expert, gpu, begin, blocks, experts, local, ROUNDS=rounds, BINS=bins, W=rows, TILE=TILE,
        num_warps=4 if rows <= 64 else 16,
    )  # fmt: skip
    _choose_kernel[(blocks,)](
        flat, counts, only, first, number, slot, begin, out, count, BINS=bins, BLOCK=BLOCK, HUGE=HUGE, num_warps=8
    )
    return out
