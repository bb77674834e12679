"""The kernel of decode attention against float32: shapes of programs, requests in parts, windows, groups of heads.

Run on GPUs by ``tests/gpu/test_decode_attention.py``, in Triton's interpreter by ``tests/unit/test_decode_kernels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.contract.attention_cases import close

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

    generator = torch.Generator().manual_seed(n)
    blocks = -(-longest // PAGE)
    keys, values = (torch.randn(n * blocks * PAGE, heads, dim, generator=generator).to(device, dtype) for _ in "kv")
    tables = torch.randperm(n * blocks, generator=generator).view(n, blocks).int().to(device)
    lens = torch.randint(1, longest + 1, (n,), generator=generator).int().to(device)
    lens[0], lens[-1] = 1, longest
    q = torch.randn(n, heads * group, dim, generator=generator).to(device, dtype)
    rows = [_rows(tables[i], int(lens[i]))[-window:] for i in range(n)]
    wanted = torch.stack([_one(q[i], keys, values, rows[i]) for i in range(n)])
    arrived = torch.zeros(n, heads, dtype=torch.int32, device=device)
    seen = min(blocks * PAGE, window + PAGE) if window else blocks * PAGE
    for _, programs in (*PROGRAMS, PROGRAMS[0]):
        out = decode(q, keys, values, tables, lens, PAGE, dim**-0.5, window, programs, arrived, seen, span)
        close(out, wanted, dtype)
        assert not arrived.any()


def _rows(table: Tensor, length: int) -> Tensor:
    return (table.long()[:, None] * PAGE + torch.arange(PAGE, device=table.device)).ravel()[:length]


def _one(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """q [H, D] over these rows, in float32."""
    k, v = (x[rows].float().repeat_interleave(q.shape[0] // x.shape[1], 1) for x in (keys, values))
    scores = torch.einsum("hd,mhd->hm", q.float(), k) * q.shape[1] ** -0.5
    return torch.einsum("hm,mhd->hd", scores.softmax(-1), v)
