"""The gate's product with few rows; softmax and the best K experts, one program a row; ids through a table.

A decode step has too few rows for one program a tile to be fast: the product is split over the columns of its input,
and the sums of the parts are added by the kernel that needs them. Ties go to the lower expert.
S: rows, D: hidden, E: experts, K: top-k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow

SPLITS = 16  # parts of the product
FEW_ROWS = 512  # beyond them cuBLAS is as fast


@triton.jit(do_not_specialize=["rows"])
def _logits_kernel(
    x_ptr, weight_ptr, parts_ptr, rows, experts,
    D: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    expert, d = tl.arange(0, BLOCK), tl.arange(0, STEP)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    inside = (expert < experts)[None, :]
    matrix = weight_ptr + expert[None, :] * D + (part * PART + d)[:, None]
    head = tl.load(matrix, mask=inside, other=0.0)  # which no kernel of a step writes
    follow(PDL)
    for first in tl.static_range(0, PART, STEP):
        column = part * PART + first + d
        x = tl.load(x_ptr + row[:, None] * D + column[None, :], mask=row[:, None] < rows, other=0.0)
        weight = head if first == 0 else tl.load(matrix + first, mask=inside, other=0.0)
        total = tl.dot(x, weight, total)
    where = (part * rows + row[:, None]) * experts + expert[None, :]
    tl.store(parts_ptr + where, total, mask=(row[:, None] < rows) & (expert[None, :] < experts))


@triton.jit(do_not_specialize=["rows"])
def _topk_kernel(
    parts_ptr, real_ptr, table_ptr, ids_ptr, weights_ptr, found_ptr, rows, experts,
    PARTS: tl.constexpr, ROUND: tl.constexpr, COUNTED: tl.constexpr, TABLE: tl.constexpr,
    K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns, part = tl.arange(0, BLOCK), tl.arange(0, PARTS)
    where = (part[:, None] * rows + row) * experts + columns[None, :]
    inside = (columns < experts)[None, :]
    logits = tl.sum(tl.load(parts_ptr + where, mask=inside, other=-float("inf")).to(tl.float32), axis=0)
    logits = logits.to(ROUND).to(tl.float32)
    exp = tl.exp(logits - tl.max(logits, axis=0))
    probs = exp / tl.sum(exp, axis=0)
    probs = tl.where(columns < experts, probs, -1.0)
    slots = tl.arange(0, K_BLOCK)
    ids = tl.zeros([K_BLOCK], tl.int32)
    weights = tl.zeros([K_BLOCK], tl.float32)
    for k in tl.static_range(K):
        best = tl.max(probs, axis=0)
        chosen = tl.min(tl.where(probs == best, columns, BLOCK), axis=0)
        ids = tl.where(slots == k, chosen, ids)
        weights = tl.where(slots == k, best, weights)
        probs = tl.where(columns == chosen, -1.0, probs)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    if COUNTED:
        ids = tl.where(row < tl.load(real_ptr), ids, -1)
    if TABLE:
        found = tl.load(table_ptr + tl.where(ids < 0, experts, ids), mask=slots < K)
        tl.store(found_ptr + row * K + slots, found, mask=slots < K)
    tl.store(ids_ptr + row * K + slots, ids.to(tl.int64), mask=slots < K)
    tl.store(weights_ptr + row * K + slots, weights, mask=slots < K)


def softmax_route(
    x: Tensor, weight_ED: Tensor, top_k: int, renormalize: bool, real: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, experts = len(x), len(weight_ED)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    found = None if table is None else torch.empty_like(ids)
    if rows:
        parts = _parts(x, weight_ED)
        _topk_kernel[(rows,)](
            parts, ids if real is None else real, ids if table is None else table, ids, weights,
            ids if found is None else found, rows, experts,
            PARTS=len(parts), ROUND=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32, COUNTED=real is not None,
            TABLE=table is not None,
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=triton.next_power_of_2(experts),
            RENORMALIZE=renormalize, num_warps=1, **chained(),
        )  # fmt: skip
    return ids, weights, found


def _parts(x: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits [parts, S, E], to be added up."""
    (rows, columns), experts = x.shape, len(weight_ED)
    step = next((step for step in (128, 64) if columns % (SPLITS * step) == 0), 0)
    if rows > FEW_ROWS or not step or x.dtype != torch.bfloat16:
        return F.linear(x, weight_ED)[None]
    parts = torch.empty(SPLITS, rows, experts, dtype=torch.float32, device=x.device)
    height = 16 if rows <= 128 else 32
    _logits_kernel[(triton.cdiv(rows, height), SPLITS)](
        x.contiguous(), weight_ED, parts, rows, experts,
        D=columns, PART=columns // SPLITS, ROWS=height, STEP=step, BLOCK=max(16, triton.next_power_of_2(experts)),
        **chained(),
        num_warps=4,
    )  # fmt: skip
    return parts


@triton.jit
def _lookup_kernel(table_ptr, ids_ptr, out_ptr, size, entries, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < size, other=0)
    found = tl.load(table_ptr + tl.where(ids < 0, ids + entries, ids), mask=i < size)
    tl.store(out_ptr + i, found, mask=i < size)


def lookup(table_E: Tensor, ids_SK: Tensor) -> Tensor:
    ids = ids_SK.contiguous()
    out = torch.empty_like(ids)
    if ids.numel():
        grid = (triton.cdiv(ids.numel(), 256),)
        _lookup_kernel[grid](table_E, ids, out, ids.numel(), len(table_E), BLOCK=256, **chained())
    return out
