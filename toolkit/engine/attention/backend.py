"""The attention seam: what a backend is given and what it must do.

T: tokens of this DP group's step, decode tokens first. H: query heads of this rank.
Backends are made by name (``make_attention``) and know neither models nor requests.
Read next: ``sdpa.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toolkit.engine.core import Batch
from toolkit.engine.kv.kinds import first_token
from toolkit.engine.kv.pool import KVCache
from toolkit.registry import Registry


@dataclass(frozen=True)
class Segment:
    """Some requests of a step whose tokens are adjacent.

    Attributes:
        first: index of the segment's first token in the step.
        q_lens: tokens of each request in this step.
        kv_lens: tokens of each request that its queries see, this step's included.
        kv_rows: their cache rows, [kv_len] of each request.
    """

    first: int
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_rows: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.num_tokens)


@dataclass(frozen=True)
class KindPlan:
    """The plan of one kind of layer: where this step's tokens go in its cache, and what each request reads.

    Attributes:
        window: tokens that a query sees, its own included; 0: all.
        rows_T: cache row of each token.
        decode: one token a request. prefill: chunks of any length.
    """

    window: int
    rows_T: Tensor
    decode: Segment
    prefill: Segment


@dataclass(frozen=True)
class AttentionPlan:
    """Made once a step: the plan of each layer, which layers of one kind share."""

    layers: tuple[KindPlan, ...]


class AttentionBackend(Protocol):
    """Causal attention over the paged cache."""

    def plan(self, batch: Batch) -> AttentionPlan:
        """Reads block tables of the scheduled requests; called once a step, before any layer."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
        """Writes k, v [T, kv heads, dim] to the cache and attends q [T, H, k_dim] over it -> [T, H, v_dim]."""
        ...

    def write(self, k: Tensor, layer: int, plan: AttentionPlan) -> None:
        """Only stores this step's keys [T, kv heads, k_dim]; for models that attend in two ways (MLA)."""
        ...

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        """Attends the decode segment's q over rows already written, values being the keys' first ``v_dim``."""
        ...

    def gather(self, layer: int, segment: Segment) -> Tensor:
        """Cached keys of the segment's requests one after another, [sum(kv_lens), kv heads, k_dim]."""
        ...

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        """Attention over given k, v [sum(kv_lens), H, dim] instead of the cache -> [tokens, H, v_dim]."""
        ...


class AttentionFactory(Protocol):
    def __call__(self, cache: KVCache, device: str) -> AttentionBackend: ...


BACKENDS: Registry[AttentionFactory] = Registry("engine.attention_backend")


def make_attention(name: str, cache: KVCache, device: str) -> AttentionBackend:
    """The backend called ``name``; auto: sdpa."""
    from toolkit.engine.attention import sdpa  # noqa: F401  (registers itself)

    return BACKENDS["sdpa" if name == "auto" else name](cache, device)


def plan_segments(batch: Batch, cache: KVCache, device: str) -> AttentionPlan:
    """The plan of a batch, in the form every backend starts from."""
    by_layer: dict[int, KindPlan] = {}
    for index, kind in enumerate(cache.kinds):
        plan = _plan_kind(batch, index, kind.window, cache.page_size, device)
        by_layer |= dict.fromkeys(kind.layers, plan)
    return AttentionPlan(tuple(by_layer[layer] for layer in range(len(by_layer))))


def _plan_kind(batch: Batch, kind: int, window: int, page_size: int, device: str) -> KindPlan:
    rows: list[Tensor] = []
    segments: list[Segment] = []
    first = 0
    for part in (batch.decode, batch.prefill):
        kv_rows: list[Tensor] = []
        for scheduled in part:
            request = scheduled.request
            begin = first_token(window, scheduled.begin)
            seen = _rows(request.blocks[kind], begin, scheduled.end, page_size)
            kv_rows.append(seen.to(device))
            rows.append(seen[len(seen) - scheduled.num_tokens :])
        q_lens = tuple(s.num_tokens for s in part)
        kv_lens = tuple(len(r) for r in kv_rows)
        segments.append(Segment(first, q_lens, kv_lens, tuple(kv_rows)))
        first += sum(q_lens)
    rows_T = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
    return KindPlan(window, rows_T.to(device), segments[0], segments[1])


def _rows(table: list[int], begin: int, end: int, page_size: int) -> Tensor:
    """Cache rows of tokens begin..end-1."""
    skipped = begin // page_size
    blocks = torch.tensor(table[skipped : -(-end // page_size)], dtype=torch.long)
    rows = (blocks[:, None] * page_size + torch.arange(page_size)).flatten()
    return rows[begin - skipped * page_size : end - skipped * page_size]
