"""Softmax over experts and the best K of them, one program a row (ties go to the lower expert); ids through a table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _topk_kernel(
    logits_ptr, ids_ptr, weights_ptr, stride, experts,
    K: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + columns, mask=columns < experts, other=-float("inf")).to(tl.float32)
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
    tl.store(ids_ptr + row * K + slots, ids.to(tl.int64), mask=slots < K)
    tl.store(weights_ptr + row * K + slots, weights, mask=slots < K)


def softmax_topk(logits_SE: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    rows, experts = logits_SE.shape
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=logits_SE.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=logits_SE.device)
    if rows:
        _topk_kernel[(rows,)](
            logits_SE, ids, weights, logits_SE.stride(0), experts,
            K=top_k, K_BLOCK=triton.next_power_of_2(top_k), BLOCK=triton.next_power_of_2(experts),
            RENORMALIZE=renormalize, num_warps=1,
        )  # fmt: skip
    return ids, weights


@triton.jit
def _lookup_kernel(table_ptr, ids_ptr, out_ptr, size, entries, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < size, other=0)
    found = tl.load(table_ptr + tl.where(ids < 0, ids + entries, ids), mask=i < size)
    tl.store(out_ptr + i, found, mask=i < size)


def lookup(table_E: Tensor, ids_SK: Tensor) -> Tensor:
    ids = ids_SK.contiguous()
    out = torch.empty_like(ids)
    if ids.numel():
        _lookup_kernel[(triton.cdiv(ids.numel(), 256),)](table_E, ids, out, ids.numel(), len(table_E), BLOCK=256)
    return out
