"""Memory that the GPUs of a host share, and the counters by which their kernels wait for each other.

A counter is never reset: a wait is for a number that grows with the round, which lives on the GPU, so that a CUDA graph
can replay. Read next: ``nvlink.py``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # at most, of a rank for each destination: a power of two
ALONE = 64  # programs at most that signal each for itself
SIGNALS = tl.constexpr(PROGRAMS)  # what a counter grows by in a round, however many programs there are
LINE = tl.constexpr(32)  # counters lie 128 bytes apart
SPINS = tl.constexpr(1 << 30)  # looks at the counters, tens of minutes, until a rank that waits for a dead one gives up
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Window:
    """This rank's view of the buffers that all ranks have, laid out alike.

    Attributes:
        peers: int64 [N], the address of each rank's buffer, own included.
        rounds: int32 [2], the number of the next dispatch and of the combine under way, from 1.
        done: int32 [2 N], programs of a dispatch and a combine that have done their part for each rank.
        x, scales, ids, weights, back, signals: where each part begins, bytes.
    """

    peers: Tensor
    rounds: Tensor
    done: Tensor
    rank: int
    x: int
    scales: int
    ids: int
    weights: int
    back: int
    signals: int


@triton.jit
def part(peers_ptr, rank, offset, dtype: tl.constexpr):
    """A pointer into a part of a rank's buffer; parts begin at multiples of 16 bytes."""
    address = tl.load(peers_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def signal(peers_ptr, to, signals, counter, done_ptr, FEW: tl.constexpr):
    """Everything this program wrote is visible to whoever sees the counter grow.

    A peer's counter takes growth from many programs one after the other: unless they are FEW, the last one speaks for
    all that ``done`` has counted here.
    """
    tl.debug_barrier()
    counters, number = part(peers_ptr, to, signals, tl.int32) + counter * LINE, tl.num_programs(0)
    if FEW:
        share = tl.full((), SIGNALS, tl.int32) // number
        tl.atomic_add(counters, share, sem="release", scope="sys")
    elif tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="sys") == number - 1:
        tl.store(done_ptr, 0)
        tl.atomic_add(counters, SIGNALS, sem="release", scope="sys")


@triton.jit
def _seen(counters):
    if INTERPRETED:
        return tl.load(counters, volatile=True)
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.s32 $0, [$1];", "=r,l,~{memory}", [counters], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait(peers_ptr, rank, signals, first, round_, N: tl.constexpr, N_BLOCK: tl.constexpr):
    """Until counters ``first`` .. ``first + N - 1`` have reached those of ``round_``, which wrap as they do."""
    source = tl.minimum(tl.arange(0, N_BLOCK), N - 1)
    counters = part(peers_ptr, rank, signals, tl.int32) + (first + source) * LINE
    wanted = round_ * SIGNALS
    spins = 0
    while (tl.min(_seen(counters) - wanted, 0) < 0) & (spins < SPINS):
        spins += 1
    if spins >= SPINS:
        tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [spins], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()  # what one thread has seen, all have


def programs(tasks: int) -> int:
    """For each destination."""
    return min(1 << (max(tasks, 1) - 1).bit_length(), PROGRAMS)


def few(tasks: int) -> bool:
    """Whether each of ``programs(tasks)`` signals for itself."""
    return programs(tasks) <= ALONE


def block(columns: int) -> int:
    return min(1 << (columns - 1).bit_length(), 2048)
