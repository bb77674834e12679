"""The gate's product with few rows; the best K experts by softmax or by groups, one program a row; their slots.

A decode step has too few rows for one program a tile to be fast: the product is split over the columns of its input,
and the sums of the parts are added by the kernel that needs them. Ties go to the lower expert.
S: rows, D: hidden, E: experts, K: top-k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from toolkit.engine.kernels.chain import chained, follow

if TYPE_CHECKING:
    from toolkit.engine.moe.gate import GroupedSigmoidGate

SPLITS = 16  # parts of the product
FEW_ROWS = 512  # beyond them cuBLAS is as fast


@triton.jit(do_not_specialize=["rows"])
def _logits_kernel(
    x_ptr, weight_ptr, parts_ptr, rows, experts,
    D: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    expert, d = tl.arange(0, BLOCK), tl.arange(0, STEP)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    inside = (expert < experts)[None, :]
    matrix = weight_ptr + expert[None, :] * D + (part * PART + d)[:, None]
    if not EARLY:
        follow(PDL)
    head = tl.load(matrix, mask=inside, other=0.0)  # which no kernel of a step writes
    if EARLY:
        follow(PDL)
    for first in tl.static_range(0, PART, STEP):
        column = part * PART + first + d
        x = tl.load(x_ptr + row[:, None] * D + column[None, :], mask=row[:, None] < rows, other=0.0)
        weight = head if first == 0 else tl.load(matrix + first, mask=inside, other=0.0)
        total = tl.dot(x, weight, total)
    where = (part * rows + row[:, None]) * experts + expert[None, :]
    tl.store(parts_ptr + where, total, mask=(row[:, None] < rows) & (expert[None, :] < experts))


@triton.jit
def _store(
    ids_ptr, weights_ptr, table_ptr, found_ptr, row, ids, weights, experts,
    K: tl.constexpr, K_BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    slots = tl.arange(0, K_BLOCK)
    at, inside = row * K + slots, slots < K
    if TABLE:
        found = tl.load(table_ptr + tl.where(ids < 0, experts, ids), mask=inside)
        tl.store(found_ptr + at, found, mask=inside)
    tl.store(ids_ptr + at, ids.to(tl.int64), mask=inside)
    tl.store(weights_ptr + at, weights, mask=inside)


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
    _store(ids_ptr, weights_ptr, table_ptr, found_ptr, row, ids, weights, experts, K, K_BLOCK, TABLE)


@triton.jit(do_not_specialize=["rows"])
def _grouped_kernel(
    parts_ptr, bias_ptr, real_ptr, table_ptr, ids_ptr, weights_ptr, found_ptr, rows, scale,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BEST: tl.constexpr, G_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr, COUNTED: tl.constexpr, TABLE: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr,
    RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts as groups [GROUPS, WIDTH]; those of the BEST groups may be chosen."""
    experts: tl.constexpr = GROUPS * WIDTH
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, G_BLOCK)
    inside = (group < GROUPS)[:, None] & (tl.arange(0, W_BLOCK) < WIDTH)[None, :]
    expert = tl.where(inside, group[:, None] * WIDTH + tl.arange(0, W_BLOCK)[None, :], experts)
    bias = tl.load(bias_ptr + expert, mask=inside, other=0.0)  # which no kernel of a step writes
    follow(PDL)
    logits = tl.zeros((G_BLOCK, W_BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(parts_ptr + (part * rows + row) * experts + expert, mask=inside, other=0.0)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = tl.where(inside, scores + bias, -float("inf"))
    # a group counts as much as its two best experts
    first = tl.max(choice, 1)
    at = tl.min(tl.where(choice == first[:, None], expert, experts), 1)
    second = tl.max(tl.where(expert == at[:, None], -float("inf"), choice), 1)
    worth = tl.where(group < GROUPS, first + second, -float("inf"))
    allowed = tl.zeros((G_BLOCK,), tl.int32)
    for _ in tl.static_range(BEST):
        taken = tl.min(tl.where(worth == tl.max(worth, 0), group, G_BLOCK), 0)
        allowed = tl.where(group == taken, 1, allowed)
        worth = tl.where(group == taken, -float("inf"), worth)
    choice = tl.where((allowed > 0)[:, None], choice, -float("inf"))
    slots = tl.arange(0, K_BLOCK)
    ids = tl.zeros([K_BLOCK], tl.int32)
    weights = tl.zeros([K_BLOCK], tl.float32)
    for k in tl.static_range(K):
        best = tl.max(tl.max(choice, 1), 0)
        chosen = tl.min(tl.min(tl.where(choice == best, expert, experts), 1), 0)
        score = tl.sum(tl.sum(tl.where(expert == chosen, scores, 0.0), 1), 0)
        ids = tl.where(slots == k, chosen, ids)
        weights = tl.where(slots == k, score, weights)
        choice = tl.where(expert == chosen, -float("inf"), choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    if COUNTED:
        ids = tl.where(row < tl.load(real_ptr), ids, -1)
    _store(ids_ptr, weights_ptr, table_ptr, found_ptr, row, ids, weights * scale, experts, K, K_BLOCK, TABLE)


def grouped_route(
    x: Tensor, gate: GroupedSigmoidGate, real: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, experts, top_k = len(x), len(gate.weight_ED), gate.top_k
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    found = None if table is None else torch.empty_like(ids)
    if rows:
        # products of bf16 values are exact in float32: the same sum, whichever the type of the factors
        step = _split(x, x.shape[1]) if gate.given_ED.dtype == torch.bfloat16 else 0
        parts = _parts(x, gate.given_ED, step) if step else F.linear(x.float(), gate.weight_ED)[None]
        width = experts // gate.n_group
        _grouped_kernel[(rows,)](
            parts, gate.bias_E, ids if real is None else real, ids if table is None else table, ids, weights,
            ids if found is None else found, rows, gate.scale,
            PARTS=len(parts), GROUPS=gate.n_group, WIDTH=width, BEST=gate.topk_group,
            G_BLOCK=triton.next_power_of_2(gate.n_group), W_BLOCK=triton.next_power_of_2(width),
            COUNTED=real is not None, TABLE=table is not None, K=top_k, K_BLOCK=triton.next_power_of_2(top_k),
            RENORMALIZE=gate.renormalize, num_warps=1, **chained(rows),
        )  # fmt: skip
    return ids, weights, found


def softmax_route(
    x: Tensor, weight_ED: Tensor, top_k: int, renormalize: bool, real: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, experts = len(x), len(weight_ED)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    found = None if table is None else torch.empty_like(ids)
    if rows:
        step = _split(x, x.shape[1])
        parts = _parts(x, weight_ED, step) if step else F.linear(x, weight_ED)[None]
        _topk_kernel[(rows,)](
            parts, ids if real is None else real, ids if table is None else table, ids, weights,
            ids if found is None else found, rows, experts,
            PARTS=len(parts), ROUND=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32, COUNTED=real is not None,
            TABLE=table is not None,
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=triton.next_power_of_2(experts),
            RENORMALIZE=renormalize, num_warps=1, **chained(rows),
        )  # fmt: skip
    return ids, weights, found


def _split(x: Tensor, columns: int) -> int:
    """Columns at a time of a product in parts; 0: not of this input."""
    if len(x) > FEW_ROWS or x.dtype != torch.bfloat16:
        return 0
    return next((step for step in (128, 64) if columns % (SPLITS * step) == 0), 0)


def _parts(x: Tensor, weight_ED: Tensor, step: int) -> Tensor:
    """Logits [SPLITS, S, E] in float32, to be added up."""
    (rows, columns), experts = x.shape, len(weight_ED)
    parts = torch.empty(SPLITS, rows, experts, dtype=torch.float32, device=x.device)
    height = 16 if rows <= 128 else 32
    _logits_kernel[(triton.cdiv(rows, height), SPLITS)](
        x.contiguous(), weight_ED, parts, rows, experts,
        D=columns, PART=columns // SPLITS, ROWS=height, STEP=step, BLOCK=max(16, triton.next_power_of_2(experts)),
        EARLY=rows <= 32, **chained(rows),
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
        _lookup_kernel[grid](table_E, ids, out, ids.numel(), len(table_E), BLOCK=256, **chained(len(ids)))
    return out
