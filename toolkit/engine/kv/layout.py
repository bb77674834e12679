"""CacheLayout: how one rank's KV cache lies in memory, and which bytes of a peer's cache belong where in one's own.

A cache is a list of regions, one for the keys and one for the values of each layer; a block is ``page_size`` rows of a
region. Two ranks may hold different heads of the same model: then rows are cut. Everything here is arithmetic: no
memory is touched, nothing is sent. Read next: ``transfer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.arch import Arch
from toolkit.engine.kv.pool import KVCache

Ids = NDArray[np.int64]
PIECE = ("region", "offset", "peer_region", "peer_offset", "num_bytes")  # columns of what ``pieces`` gives


class CacheLayout(msgspec.Struct, frozen=True):
    """One rank's cache.

    Attributes:
        heads, first_head, total_heads: KV heads of this rank, which they are, and all of the model. MLA: 1, 0, 1.
        k_dim, v_dim: values a head, token and layer; ``v_dim`` = 0: values are part of the keys.
        windows, layers, blocks: of each kind of layer (``kinds.py``); ``blocks``: how many there are.
    """

    page_size: int
    dtype: str
    heads: int
    first_head: int
    total_heads: int
    k_dim: int
    v_dim: int
    windows: list[int]
    layers: list[list[int]]
    blocks: list[int]

    @classmethod
    def of(cls, cache: KVCache, arch: Arch, attn_tp: int, attn_tp_rank: int) -> CacheLayout:
        spec, shards = cache.spec, min(attn_tp, arch.kv_heads)
        first = attn_tp_rank * shards // attn_tp * spec.heads
        return cls(
            cache.page_size, str(cache.k[0].dtype).removeprefix("torch."), spec.heads, first, arch.kv_heads, spec.k_dim,
            spec.v_dim, [kind.window for kind in cache.kinds], [list(kind.layers) for kind in cache.kinds],
            [kind.num_blocks for kind in cache.kinds],
        )  # fmt: skip

    @property
    def dims(self) -> list[int]:
        """Values a head and token of the regions of one layer."""
        return [self.k_dim, self.v_dim] if self.v_dim else [self.k_dim]

    @property
    def item_bytes(self) -> int:
        return torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()


def regions(cache: KVCache) -> list[Tensor]:
    """The cache's tensors, in the order in which ``pieces`` numbers them."""
    layers = [layer for kind in cache.kinds for layer in kind.layers]
    pairs = [[cache.k[layer], cache.v[layer]] if cache.spec.v_dim else [cache.k[layer]] for layer in layers]
    return [tensor for pair in pairs for tensor in pair]


def mismatch(mine: CacheLayout, theirs: CacheLayout) -> str:
    """Why blocks of one cache cannot be read into the other; empty when they can."""
    for name in ("page_size", "dtype", "total_heads", "k_dim", "v_dim", "windows", "layers"):
        ours, other = getattr(mine, name), getattr(theirs, name)
        if ours != other:
            return f"{name} is {other} in the peer's KV cache and {ours} here: prefill and decode workers must agree"
    return ""


def sources(mine: CacheLayout, my_rank: int, theirs: Sequence[CacheLayout]) -> list[int]:
    """Which of a group's ranks to read from: one for each shard of heads that overlaps mine.

    Where several ranks hold the same heads (MLA, or more ranks than KV heads), readers spread over them by their own
    rank in their group; the leader reads from the group's leader.
    """
    holders: dict[int, list[int]] = {}
    for rank, layout in enumerate(theirs):
        if layout.first_head < mine.first_head + mine.heads and mine.first_head < layout.first_head + layout.heads:
            holders.setdefault(layout.first_head, []).append(rank)
    return [ranks[my_rank % len(ranks)] for ranks in holders.values()]


class Blocks(NamedTuple):
    """Blocks of one kind of layer: block ``theirs[i]`` of the peer goes to block ``mine[i]``."""

    mine: Sequence[int]
    theirs: Sequence[int]


def pieces(mine: CacheLayout, theirs: CacheLayout, blocks: Sequence[Blocks]) -> Ids:
    """What to copy, as rows of ``PIECE``. Adjacent blocks that lie adjacent on both sides are one piece.

    Args:
        blocks: of each kind of layer.
    """
    parts: list[Ids] = []
    region = 0
    for kind, (own, other) in enumerate(blocks):
        count = len(mine.layers[kind]) * len(mine.dims)
        runs = _runs(np.asarray(own, np.int64), np.asarray(other, np.int64))
        for part, dim in enumerate(mine.dims):
            row = mine.item_bytes * dim
            offsets, peer_offsets, sizes = _cut(mine, theirs, runs, row)
            numbers = np.arange(region + part, region + count, len(mine.dims))
            shape = (len(numbers), len(offsets))
            columns = (numbers[:, None], offsets, numbers[:, None], peer_offsets, sizes)
            parts.append(np.stack([np.broadcast_to(column, shape).ravel() for column in columns], axis=1))
        region += count
    return np.concatenate(parts) if parts else np.empty((0, len(PIECE)), np.int64)


def _runs(own: Ids, other: Ids) -> Ids:
    """[n, 3]: first block here, first block there, number of blocks."""
    assert len(own) == len(other), (len(own), len(other))
    if not len(own):
        return np.empty((0, 3), np.int64)
    begins = np.flatnonzero(np.r_[True, (np.diff(own) != 1) | (np.diff(other) != 1)])
    return np.stack([own[begins], other[begins], np.diff(np.r_[begins, len(own)])], axis=1)


def _cut(mine: CacheLayout, theirs: CacheLayout, runs: Ids, row: int) -> tuple[Ids, Ids, Ids]:
    """(offsets here, offsets there, sizes) in bytes of one region's pieces; ``row``: bytes of one head and token."""
    if (mine.heads, mine.first_head) == (theirs.heads, theirs.first_head):
        block = mine.page_size * mine.heads * row
        return runs[:, 0] * block, runs[:, 1] * block, runs[:, 2] * block
    low = max(mine.first_head, theirs.first_head)
    high = min(mine.first_head + mine.heads, theirs.first_head + theirs.heads)
    tokens = np.concatenate([np.arange(count * mine.page_size) for count in runs[:, 2]] or [np.empty(0, np.int64)])
    firsts = np.repeat(runs[:, :2], runs[:, 2] * mine.page_size, axis=0) * mine.page_size
    here = ((firsts[:, 0] + tokens) * mine.heads + low - mine.first_head) * row
    there = ((firsts[:, 1] + tokens) * theirs.heads + low - theirs.first_head) * row
    return here, there, np.full(len(here), (high - low) * row)
