"""Many copies in one kernel, between any addresses that the GPU reaches: KV blocks out of a peer's cache.

A program copies one tile of one span; programs beyond a span's end have nothing to do. Words of 8 bytes where all
addresses and sizes allow it, else of 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16384
WARPS = 8


@triton.jit
def _copy_kernel(spans_ptr, WORD: tl.constexpr, TILE: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TILE
    count = tl.load(spans_ptr + 3 * span + 2) // WORD
    if first < count:
        if WORD == 8:
            to = tl.load(spans_ptr + 3 * span).to(tl.pointer_type(tl.int64))
            source = tl.load(spans_ptr + 3 * span + 1).to(tl.pointer_type(tl.int64))
        else:
            to = tl.load(spans_ptr + 3 * span).to(tl.pointer_type(tl.int8))
            source = tl.load(spans_ptr + 3 * span + 1).to(tl.pointer_type(tl.int8))
        at = first + tl.arange(0, TILE)
        mask = at < count
        tl.store(to + at, tl.load(source + at, mask=mask), mask=mask)


def copy_spans(spans: Tensor, longest: int, aligned: bool) -> None:
    """Copies (to, from, bytes) of each row of ``spans`` [n, 3], on the current stream.

    Args:
        longest: bytes of the longest span.
        aligned: all addresses and sizes are multiples of 8 bytes.
    """
    assert spans.dtype == torch.int64 and spans.is_contiguous(), (spans.dtype, spans.shape)
    if not longest or not len(spans):
        return
    word = 8 if aligned else 1
    tile = TILE_BYTES // 8 if aligned else 1024
    grid = (len(spans), triton.cdiv(longest, word * tile))
    _copy_kernel[grid](spans, word, tile, num_warps=WARPS)
