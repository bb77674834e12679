"""The attention seam: what a backend is given and what it must do.

T: tokens of this DP group's step, decode tokens first. H: query heads of this rank.
Backends are made by name (``make_attention``) and know neither models nor requests.
Read next: ``sdpa.py``, then ``paged.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.engine.core import Batch
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.staging import Ints
from toolkit.registry import Registry


@dataclass(frozen=True)
class Segment:
    """Some requests of a step whose tokens are adjacent. Backends add what they read.

    Attributes:
        first: index of the segment's first token in the step.
        q_lens: tokens of each request in this step.
    """

    first: int
    q_lens: tuple[int, ...]

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
        scratch: what the backend works out in the first layer of the kind for all, by first token of the segment.
    """

    window: int
    rows_T: Tensor
    decode: Segment
    prefill: Segment
    scratch: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionPlan:
    """Made once a step: the plan of each layer, which layers of one kind share."""

    layers: tuple[KindPlan, ...]


class AttentionBackend(Protocol):
    """Causal attention over the paged cache.

    Attributes:
        cache: the rank's keys and values.
        capturable: ``static_shapes``, ``static_plan`` and ``static_arrays`` are there, so that a decode step can be
            captured in a CUDA graph.
    """

    cache: KVCache
    capturable: bool

    def plan(self, batch: Batch) -> AttentionPlan:
        """Reads block tables of the scheduled requests; called once a step, before any layer."""
        ...

    def write(self, k: Tensor, v: Tensor | None, layer: int, plan: AttentionPlan) -> None:
        """Stores this step's k, v [T, kv heads, dim]; v is None where values are part of the keys (MLA)."""
        ...

    def forward(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
        """Attends q [T, H, k_dim] over the cache, this step's rows included -> [T, H, v_dim]."""
        ...

    def decode(self, q: Tensor, layer: int, plan: AttentionPlan, scale: float, v_dim: int) -> Tensor:
        """Attends the decode segment's q over rows already written, values being the keys' first ``v_dim``."""
        ...

    def gather(self, layer: int, segment: Segment) -> Tensor:
        """Cached keys of the segment's requests one after another, [sum of their lengths, kv heads, k_dim]."""
        ...

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float) -> Tensor:
        """Attention over given k, v, laid out as ``gather`` does, instead of the cache -> [tokens, H, v_dim]."""
        ...

    def static_shapes(self, size: int, max_len: int) -> list[tuple[int, ...]]:
        """Shapes of the int32 tensors that a plan of ``size`` decoding requests of up to ``max_len`` tokens reads."""
        ...

    def static_plan(self, size: int, max_len: int, views: list[Tensor]) -> AttentionPlan:
        """A plan that reads ``views``, whatever they hold when it runs."""
        ...

    def static_arrays(self, batch: Batch, size: int, max_len: int) -> list[Ints]:
        """What the views must hold for ``batch``, which only decodes; the rest of ``size`` is padding."""
        ...


class AttentionFactory(Protocol):
    def __call__(self, cache: KVCache, device: str) -> AttentionBackend: ...


BACKENDS: Registry[AttentionFactory] = Registry("engine.attention_backend")


def make_attention(name: str, cache: KVCache, device: str) -> AttentionBackend:
    """The backend called ``name``; auto: sdpa on CPU, on GPUs the fastest that is installed and takes the cache."""
    from toolkit.engine.attention import fa3, flash_mla, sdpa, triton_decode, varlen  # noqa: F401  (register themselves)

    return BACKENDS[choose(cache, device) if name == "auto" else name](cache, device)


def choose(cache: KVCache, device: str) -> str:
    """What ``auto`` stands for. The order is measured: docs/performance.md."""
    from toolkit.engine.attention import fa3, flash_mla, triton_decode, varlen

    if device == "cpu" or cache.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if flash_mla.fits(cache):
        return "flash_mla"
    if cache.fp8:
        raise ValueError(
            "engine.kv_cache_dtype=fp8_e4m3 is read by FlashMLA (sgl-flash-mla, sglang-kernel) on Hopper with "
            f"page_size={flash_mla.PAGE}, not with page_size={cache.page_size} as things are here: use both, or "
            "kv_cache_dtype=auto"
        )
    if triton_decode.fits(cache):
        return "triton"
    if fa3.fits(cache):
        return "fa3"
    return "varlen" if varlen.fits(cache) else "sdpa"
