"""The way back of a decode step over NVLink: results to the rows' own ranks, and their sum there.

What ``nvlink.py`` says of rounds, ranks and letters holds here. Read next: ``moe/nvlink.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow
from toolkit.engine.kernels.norms import added, normed
from toolkit.engine.kernels.rows import weighted_sum
from toolkit.engine.kernels.signals import Window, block, few, part, programs, signal, wait
from toolkit.engine.layers import RMSNorm


@triton.jit(do_not_specialize=["step_rows", "rank"])
def _give_back_kernel(
    y_ptr, rows_ptr, peers_ptr, rounds_ptr, done_ptr, step_rows, rank, weights_at, back_at, signals,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, FEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    to = tl.program_id(1)
    if (tl.program_id(0) == 0) & (to == 0):
        tl.store(rounds_ptr, tl.load(rounds_ptr) + 1)
    back = part(peers_ptr, to, back_at, y_ptr.dtype.element_ty)
    weights_in = part(peers_ptr, rank, weights_at, tl.float32)
    for task in range(tl.program_id(0), step_rows * PARTS, tl.num_programs(0)):
        s, d = task // PARTS, task % PARTS * BLOCK + tl.arange(0, BLOCK)
        at = (to * step_rows + s) * K + tl.arange(0, K_BLOCK)
        inside = tl.arange(0, K_BLOCK) < K
        rows = tl.load(rows_ptr + at, mask=inside, other=-1)
        weights = tl.load(weights_in + at, mask=inside, other=0.0)
        total = weighted_sum(y_ptr, rows, weights, d, D).to(y_ptr.dtype.element_ty)
        sent = tl.max(rows, 0, keep_dims=True) >= 0
        tl.store(back + (rank * step_rows + s) * D + d, total, mask=(d < D) & sent)
    signal(peers_ptr, to, signals, N + rank, done_ptr + N + to, FEW)


@triton.jit(do_not_specialize=["rows", "step_rows", "rank"])
def _total_kernel(
    out_ptr, slots_ptr, more_ptr, x_ptr, sum_ptr, weight_ptr, peers_ptr, rounds_ptr, rows, step_rows, rank,
    back_at, signals, e, eps,
    N: tl.constexpr, N_BLOCK: tl.constexpr, D: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, MORE: tl.constexpr, NORM: tl.constexpr, ADD_ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: ``out`` = total (+ more); where NORM: ``sum`` = x + that, ``out`` = its norm."""
    follow(PDL)
    row = tl.program_id(0)
    d, k = tl.arange(0, BLOCK), tl.arange(0, K_BLOCK)
    real = tl.zeros((1,), tl.int32) + row < rows
    here = (d < D) & real
    slots = tl.load(slots_ptr + row * K + k, mask=(k < K) & real, other=-1).to(tl.int32)
    if MORE:
        more = tl.load(more_ptr + row * D + d, mask=here, other=0.0)
    if NORM:
        x = tl.load(x_ptr + row * D + d, mask=here, other=0.0)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    wait(peers_ptr, rank, signals, N, tl.load(rounds_ptr + 1), N, N_BLOCK)
    back = part(peers_ptr, rank, back_at, out_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK,), tl.float32)
    for source in tl.static_range(N):
        sent = tl.max(((slots >= source * e) & (slots < (source + 1) * e)).to(tl.int32), 0, keep_dims=True) > 0
        total += tl.load(back + (source * step_rows + row) * D + d, mask=here & sent, other=0.0).to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    if MORE:
        out = added(out, more)
    if NORM:
        out = added(x, out)
        tl.store(sum_ptr + row * D + d, out, mask=here)
        out = normed(out, weight, D, eps, ADD_ONE)
    tl.store(out_ptr + row * D + d, out, mask=here)


def give_back(w: Window, y: Tensor, rows: Tensor, step_rows: int) -> None:
    """Each received row's weighted sum over its placed results y [R, D], to the rank it came from."""
    columns, ranks, top_k = y.shape[1], len(w.peers), rows.shape[1]
    width = min(block(columns), 1024)  # columns of a program: 8 of each of its 128 threads, all K rows at once
    parts = triton.cdiv(columns, width)
    _give_back_kernel[(programs(step_rows * parts), ranks)](
        y, rows, w.peers, w.rounds, w.done, step_rows, w.rank, w.weights, w.back, w.signals,
        N=ranks, D=columns, K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=width, PARTS=parts,
        FEW=few(step_rows * parts), num_warps=4, **chained(step_rows),
    )  # fmt: skip


def total(
    w: Window, slots: Tensor, columns: int, dtype: torch.dtype, step_rows: int, e: int, more: Tensor | None = None
) -> Tensor:
    """[S, D]: what the ranks of each row's ``slots`` gave back, plus ``more``. A rank without rows waits too."""
    out = torch.empty(len(slots), columns, dtype=dtype, device=slots.device)
    _total(w, slots, step_rows, e, more, out, None)
    return out


def total_norm(
    w: Window, slots: Tensor, step_rows: int, e: int, more: Tensor | None, x: Tensor, norm: RMSNorm
) -> tuple[Tensor, Tensor]:
    """(x + total, the norm of that), both [S, D] of x's type."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    added = torch.empty_like(out)
    _total(w, slots, step_rows, e, more, out, (x.contiguous(), added, norm))
    return added, out


def _total(
    w: Window, slots: Tensor, step_rows: int, e: int, more: Tensor | None, out: Tensor,
    into: tuple[Tensor, Tensor, RMSNorm] | None,
) -> None:  # fmt: skip
    (rows, top_k), columns, ranks = slots.shape, out.shape[1], len(w.peers)
    x, added, norm = into or (out, out, None)
    width = triton.next_power_of_2(columns)
    _total_kernel[(max(rows, 1),)](
        out, slots, out if more is None else more.contiguous(), x, added, out if norm is None else norm.weight,
        w.peers, w.rounds, rows, step_rows, w.rank, w.back, w.signals, e, norm.eps if norm is not None else 0.0,
        N=ranks, N_BLOCK=triton.next_power_of_2(ranks), D=columns, K=top_k, K_BLOCK=triton.next_power_of_2(top_k),
        BLOCK=width, MORE=more is not None, NORM=norm is not None, ADD_ONE=norm is not None and norm.add_one,
        num_warps=min(max(width // 256, 1), 16), **chained(step_rows),
    )  # fmt: skip
