"""Triton kernel of the expert recorder: what a layer's gate chose and what its slots received, counted in one launch.

The torch calls that say the same are in ``eplb/recorder.py``: five small kernels a layer, which a decode step notices.
N: assignments, E: experts, e: slots of this rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow

BLOCK = 1024  # assignments of a program


# Sizes that change from step to step are not specialised: a new one must never be compiled while requests wait.
@triton.jit(do_not_specialize=["N"])
def _count_kernel(
    ids_ptr, counts_ptr, rows_ptr, received_ptr, N, E, SLOTS, BINS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < N, other=-1).to(tl.int32)
    e = tl.arange(0, BINS)
    found = tl.histogram(tl.where(ids < 0, E, ids), BINS).to(tl.int64)  # padding into a bin that is not added
    tl.atomic_add(counts_ptr + e, found, mask=(e < E) & (found > 0))
    if tl.program_id(0) == 0:
        s = tl.arange(0, ROWS)
        rows = tl.load(rows_ptr + s, mask=s < SLOTS, other=0).to(tl.int64)
        before = tl.load(received_ptr + s, mask=s < SLOTS, other=0)
        tl.store(received_ptr + s, before + rows, mask=s < SLOTS)


def count(ids: Tensor, counts_E: Tensor, rows_e: Tensor, received_e: Tensor) -> None:
    """Adds the ids [...] (-1: padding) to ``counts_E``, and ``rows_e`` to ``received_e``; both sums are int64."""
    flat, experts, slots = ids.contiguous(), len(counts_E), len(rows_e)
    _count_kernel[(max(1, triton.cdiv(flat.numel(), BLOCK)),)](
        flat, counts_E, rows_e.contiguous(), received_e, flat.numel(), experts, slots,
        BINS=triton.next_power_of_2(experts + 1), ROWS=triton.next_power_of_2(slots), BLOCK=BLOCK, num_warps=4,
        **chained(),
    )  # fmt: skip
