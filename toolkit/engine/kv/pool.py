"""The KV cache of one rank: the tensors, and the books on the blocks of one kind of layer.

``KVCache`` owns the memory. ``BlockPool`` owns the books: reference counts, the prefix cache (blocks found again by
the hash of everything up to their end), and which unused block is given away first. It knows neither requests nor
tensors, every operation is O(1) a block (O(log n) without prefix cache), and ranks of one attention TP group keep equal
books by doing the same.
Read next: ``tables.py``.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from toolkit.engine.fp8 import FP8_MAX
from toolkit.engine.kv.kinds import LayerKind


@dataclass(frozen=True)
class KVSpec:
    """What one token leaves in the cache of one layer of one rank.

    ``v_dim`` = 0 means that values are the leading part of the keys (MLA's latent).
    """

    heads: int
    k_dim: int
    v_dim: int


class KVCache:
    """Paged keys and values: ``k[layer]`` is [rows, heads, k_dim]; block b owns page_size rows from b * page_size.

    Layers of one kind have equally many blocks, in one allocation. On a GPU there is one more after the last, which
    belongs to nobody: the padding of a step with a fixed shape (a CUDA graph) is written there.

    Args:
        dtype: of what is written and read.
        memory: gives that many zeroed bytes of the device; None: torch does.
        fp8: values are kept in float8_e4m3, without a scale: what is normed and rotated fits its range of 448.

    Raises:
        MemoryError: the device cannot hold it.
    """

    def __init__(
        self,
        spec: KVSpec,
        kinds: Sequence[LayerKind],
        page_size: int,
        dtype: torch.dtype,
        device: str,
        memory: Callable[[int], Tensor] | None = None,
        fp8: bool = False,
    ) -> None:
        self.spec, self.kinds, self.page_size = spec, tuple(kinds), page_size
        self.dtype, self.fp8 = dtype, fp8
        stored = torch.float8_e4m3fn if fp8 else dtype
        spare = 0 if torch.device(device).type in ("cpu", "meta") else 1

        def allocate(dim: int) -> list[Tensor]:
            by_layer: dict[int, Tensor] = {}
            for kind in kinds:
                rows = (kind.num_blocks + spare) * page_size
                shape = (len(kind.layers), rows, spec.heads, dim)
                if memory is None:
                    whole = torch.zeros(shape, dtype=stored, device=device)
                else:
                    whole = memory(math.prod(shape) * stored.itemsize).view(stored).view(shape)
                by_layer |= zip(kind.layers, whole)
            return [by_layer[layer] for layer in range(len(by_layer))]

        self.k, self.v = allocate(spec.k_dim), allocate(spec.v_dim)

    @property
    def num_blocks(self) -> int:
        """Blocks of the kind that sees furthest: what limits the length of contexts."""
        return self.kinds[0].num_blocks

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as [blocks, page_size, heads, dim]."""
        size = self.page_size
        return self.k[layer].unflatten(0, (-1, size)), self.v[layer].unflatten(0, (-1, size))

    def write(self, layer: int, rows_T: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Stores k [T, heads, k_dim] (and v) at the cache rows ``rows_T``."""
        rows = rows_T.long()
        for cache, values in ((self.k[layer], k), (self.v[layer], v)):
            if values is None:
                continue
            if self.fp8:  # as bytes, which every operation takes
                cache.view(torch.uint8).index_copy_(0, rows, to_fp8(values).view(torch.uint8))
            else:
                cache.index_copy_(0, rows, values)

    def read(self, layer: int, rows: Tensor) -> Tensor:
        """Keys of the cache rows [n, heads, k_dim], in ``dtype``."""
        if not self.fp8:
            return self.k[layer].index_select(0, rows)
        chosen = self.k[layer].view(torch.uint8).index_select(0, rows)
        return chosen.view(torch.float8_e4m3fn).to(self.dtype)

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer."""
        spec = self.spec
        return spec.heads * (spec.k_dim + spec.v_dim) * self.k[0].element_size()

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in (*self.k, *self.v))


def to_fp8(x: Tensor) -> Tensor:
    """float8_e4m3, values beyond its range at its end."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class BlockPool:
    """Reference-counted blocks with a prefix cache.

    A block whose count falls to zero keeps its content and stays findable until it is given away; the one that was
    released longest ago goes first. Without prefix cache the lowest goes first: a request's blocks then lie in runs,
    which a transfer reads as one piece each.
    """

    def __init__(self, num_blocks: int, prefix_cache: bool = True) -> None:
        self.num_blocks, self.prefix_cache = num_blocks, prefix_cache
        self._refs = [0] * num_blocks
        self._hash: list[int | None] = [None] * num_blocks
        self._by_hash: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._lowest = [] if prefix_cache else list(range(num_blocks))  # a heap of the free ones

    @property
    def num_free(self) -> int:
        """Blocks nobody uses, cached content or not."""
        return len(self._free)

    def find(self, block_hash: int) -> int | None:
        """The cached block of that content. Takes no reference."""
        return self._by_hash.get(block_hash)

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` would leave the free ones if they were acquired."""
        return sum(self._refs[block] == 0 for block in blocks)

    def acquire(self, blocks: Sequence[int]) -> None:
        """Takes one more reference on each of ``blocks``."""
        for block in blocks:
            if self._refs[block] == 0:
                assert self.prefix_cache, "what nobody uses is not found again without a prefix cache"
                del self._free[block]
            self._refs[block] += 1

    def allocate(self) -> int:
        """A block of unknown content with one reference. There must be a free one."""
        if self.prefix_cache:
            block, _ = self._free.popitem(last=False)
        else:
            block = heapq.heappop(self._lowest)
            del self._free[block]
        assert self._refs[block] == 0, f"block {block} was free with {self._refs[block]} references"
        self._forget(block)
        self._refs[block] = 1
        return block

    def publish(self, block: int, block_hash: int) -> None:
        """Makes a full block findable. If its content is cached already, the older block stays the one found."""
        if self.prefix_cache and self._hash[block] is None and block_hash not in self._by_hash:
            self._hash[block] = block_hash
            self._by_hash[block_hash] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Gives one reference of each back; later blocks of a request are given away before earlier ones."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} was released once too often"
            if self._refs[block] == 0:
                self._free[block] = None
                if not self.prefix_cache:
                    heapq.heappush(self._lowest, block)

    def clear_cache(self) -> None:
        """Forgets all cached content; running requests keep their blocks."""
        for block in list(self._by_hash.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        block_hash = self._hash[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hash[block] = None

    def audit(self, holders: Sequence[Sequence[int]]) -> None:
        """Asserts that the books are right, given the blocks of every request that holds some."""
        refs = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from what requests hold"
        assert set(self._free) == {b for b, n in enumerate(refs) if n == 0}, "free blocks are not the unreferenced ones"
        assert all(self._hash[b] == h for h, b in self._by_hash.items()), "prefix cache points at a reused block"
        assert len(self._by_hash) == sum(h is not None for h in self._hash), "a cached block cannot be found"


def block_hash(parent: int, tokens: Sequence[int]) -> int:
    """128-bit hash of a full block and all before it. ``parent``: the previous block's, 0 for the first."""
    digest = xxhash.xxh3_128(parent.to_bytes(16, "little"))
    digest.update(b"".join(token.to_bytes(4, "little") for token in tokens))
    return digest.intdigest()
