"""The kernel of decode attention against float32: shapes of programs, requests in parts, windows, groups of heads.

Run on GPUs by ``tests/gpu/test_decode_attention.py``, in Triton's interpreter by ``tests/unit/test_decode_kernels.py``.
"""

from __future__ import annotations

import random

import torch

from tests.contract.attention_cases import close, expected, given
from toolkit.engine.attention.paged import PagedAttention, PagedSegment
from toolkit.engine.kv.pool import KVSpec

PAGE, LONGEST = 64, 300
# requests, heads of keys, query heads of each, values a head, window, tokens that one program reads
SHAPES = [
    (5, 2, 8, 128, 0, 4096),
    (6, 2, 8, 128, 0, 128),
    (6, 1, 16, 64, 200, 64),
    (3, 2, 3, 128, 0, 192),
    (9, 2, 1, 64, 48, 4096),
    (4, 2, 4, 256, 0, 256),
]


def check(
    n: int, heads: int, group: int, dim: int, window: int, span: int,
    device: str = "cpu", dtype: torch.dtype = torch.float32, longest: int = LONGEST,
) -> None:  # fmt: skip
    """With every shape of programs; what it counts parts with is left as it was found."""
    from toolkit.engine.kernels.decode_attention import SHAPES as PROGRAMS
    from toolkit.engine.kernels.decode_attention import decode

    rng = random.Random(n)
    lens = [1, *(rng.randint(1, longest) for _ in range(n - 2)), longest]
    g = given(([(length - 1, 1) for length in lens], []), KVSpec(heads, dim, dim), PAGE, dtype, device, window)
    paged = PagedAttention(g.cache, device)
    plan = paged.plan(g.batch)
    paged.write(g.k, g.v, 1, plan)
    segment = plan.layers[1].decode
    assert isinstance(segment, PagedSegment)
    q = torch.randn(n, heads * group, dim, device=device).to(dtype)
    wanted = expected(g, q, dim**-0.5, window, dim)
    arrived = torch.zeros(n, heads, dtype=torch.int32, device=device)
    seen = min(longest, window) + PAGE if window else longest
    for _, programs in (*PROGRAMS, PROGRAMS[0]):
        out = decode(
            q, g.cache.k[1], g.cache.v[1], segment.tables_nP, segment.lens_n, PAGE, dim**-0.5, window, programs,
            arrived, seen, span,
        )  # fmt: skip
        close(out, wanted, dtype)
        assert not arrived.any()
