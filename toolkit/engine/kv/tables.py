"""Block tables: which KV blocks each running request has, in one pool for each kind of layer.

``request.blocks[kind][i]`` holds tokens i * page_size and following; ``NO_BLOCK`` where a sliding window has moved on.
All tables of a request are equally long, so one block more means one in every pool. A cached prefix can be used up to
a point where every kind still has what a query there would see: for a sliding kind that is the last window only.
Knows neither tensors nor what is scheduled. Read next: ``scheduler.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.engine.core import Request
from toolkit.engine.kv.kinds import LayerKind, first_token, window_blocks
from toolkit.engine.kv.pool import BlockPool, block_hash

NO_BLOCK = -1


class BlockTables:
    """The KV blocks of one rank and who has them.

    Args:
        kinds: as the rank's ``KVCache`` has them.
        prefix_cache: find full blocks of earlier requests again.
    """

    def __init__(self, kinds: Sequence[LayerKind], page_size: int, prefix_cache: bool = True) -> None:
        self.kinds, self.page_size, self.prefix_cache = tuple(kinds), page_size, prefix_cache
        self.pools = [BlockPool(kind.num_blocks, prefix_cache) for kind in kinds]

    @property
    def num_blocks(self) -> int:
        """Blocks of the kind that sees furthest: what limits the length of contexts."""
        return self.pools[0].num_blocks

    @property
    def num_free(self) -> int:
        """Unused ones among ``num_blocks``, cached content or not."""
        return self.pools[0].num_free

    @property
    def num_spare(self) -> int:
        """Unused blocks of the kind that has fewest."""
        return min(pool.num_free for pool in self.pools)

    def can_hold(self, num_tokens: int) -> bool:
        """True when a request of ``num_tokens``, alone and computed token by token, never lacks a block."""
        return all(
            pool.num_blocks >= self._peak(kind, self._blocks(num_tokens), step_tokens=1)
            for kind, pool in zip(self.kinds, self.pools)
        )

    def admit(self, request: Request, step_tokens: int, reserve: int, reuse: bool = True) -> bool:
        """Gives the request the blocks of its longest cached prefix and sets ``num_computed`` to its length.

        Args:
            step_tokens: the most tokens of the request that are computed in one step.
            reserve: blocks of each kind that must stay free after the whole request was computed; 0: no matter.
            reuse: False: all its tokens will be computed, whatever is cached.

        Returns:
            False, with nothing taken, when there are too few free blocks.
        """
        cached = self._match(request) if reuse else [[] for _ in self.pools]
        total = self._blocks(len(request.tokens))
        taken = [[block for block in table if block != NO_BLOCK] for table in cached]
        for kind, pool, blocks in zip(self.kinds, self.pools, taken):
            missing = min(total - len(cached[0]), self._peak(kind, total, step_tokens) - len(blocks))
            if reserve and max(missing, 0) + pool.num_idle(blocks) + reserve > pool.num_free:
                return False
        for pool, blocks in zip(self.pools, taken):
            pool.acquire(blocks)
        request.blocks = cached
        request.num_published = len(cached[0])
        request.num_computed = request.num_published * self.page_size
        return True

    def place(self, request: Request, reserve: int) -> bool:
        """Gives the request blocks for KV of all its tokens that is written from outside, and takes it as computed.

        Returns:
            False, with nothing taken, when fewer than ``reserve`` blocks of a kind would stay free.
        """
        count = len(request.tokens)
        total = self._blocks(count)
        firsts = [self._first_block(kind, count) for kind in self.kinds]
        if any(total - first + reserve > pool.num_free for first, pool in zip(firsts, self.pools)):
            return False
        request.blocks = [
            [NO_BLOCK] * first + [pool.allocate() for _ in range(total - first)]
            for first, pool in zip(firsts, self.pools)
        ]
        request.num_computed, request.num_published = count, count // self.page_size
        return True

    def room(self, request: Request) -> int:
        """Tokens after the computed ones that its blocks and the free ones can hold."""
        free = min(pool.num_free for pool in self.pools)
        return (len(request.blocks[0]) + free) * self.page_size - request.num_computed

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Allocates blocks until ``num_tokens`` tokens fit; False, with nothing taken, when they run out."""
        missing = self._blocks(num_tokens) - len(request.blocks[0])
        if missing <= 0:
            return True
        if missing > min(pool.num_free for pool in self.pools):
            return False
        for pool, table in zip(self.pools, request.blocks):
            table.extend(pool.allocate() for _ in range(missing))
        return True

    def computed(self, request: Request, known: int) -> None:
        """After a step: offers the blocks it filled to the prefix cache, and frees those no later token sees.

        A later step may have been launched already. What reads or writes these blocks again comes after it.

        Args:
            known: leading tokens of the request whose ids are known; the prefix cache is found by ids.
        """
        full = min(request.num_computed, known) // self.page_size
        if self.prefix_cache and full > request.num_published:
            self._hash(request, known)
            for i in range(request.num_published, full):
                for pool, table in zip(self.pools, request.blocks):
                    pool.publish(table[i], request.block_hashes[i])
            request.num_published = full
        for kind, pool, table in zip(self.kinds, self.pools, request.blocks):
            if not kind.window:
                continue  # later tokens see all of it
            end = self._first_block(kind, request.num_computed)
            begin = end
            while begin > 0 and table[begin - 1] != NO_BLOCK:
                begin -= 1
            pool.release(table[begin:end])
            table[begin:end] = [NO_BLOCK] * (end - begin)

    def release(self, request: Request) -> None:
        """Takes all blocks of the request back."""
        for pool, table in zip(self.pools, request.blocks):
            pool.release([block for block in table if block != NO_BLOCK])
        request.blocks = []
        request.num_computed = request.num_published = 0

    def clear_cache(self) -> None:
        """Forgets all cached content; running requests keep their blocks."""
        for pool in self.pools:
            pool.clear_cache()

    def audit(self, running: Sequence[Request]) -> None:
        """Asserts that no block is leaked or shared wrongly, and that each request has what it will read."""
        for k, (kind, pool) in enumerate(zip(self.kinds, self.pools)):
            tables = [request.blocks[k] for request in running]
            pool.audit([[block for block in table if block != NO_BLOCK] for table in tables])
            for request, table in zip(running, tables):
                first = self._first_block(kind, request.num_computed)
                assert NO_BLOCK not in table[first:], f"{request.rid} lacks a block of window {kind.window}"
                assert set(table[:first]) <= {NO_BLOCK}, f"{request.rid} keeps blocks behind window {kind.window}"

    # --- inside -----------------------------------------------------------------------------------

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _first_block(self, kind: LayerKind, position: int) -> int:
        """The block of the earliest token that a query at ``position`` sees."""
        return first_token(kind.window, position) // self.page_size

    def _peak(self, kind: LayerKind, total: int, step_tokens: int) -> int:
        """The most of a request's ``total`` blocks it has at a time, given ``step_tokens`` new tokens a step."""
        if not kind.window:
            return total
        return min(total, window_blocks(kind.window + step_tokens - 1, self.page_size))

    def _match(self, request: Request) -> list[list[int]]:
        """Tables of the longest cached prefix that leaves at least one token to compute, for its logits."""
        self._hash(request, len(request.tokens))
        hashes = request.block_hashes[: (len(request.tokens) - 1) // self.page_size]
        usable, runs = 0, [0] * len(self.kinds)
        for i, digest in enumerate(hashes):
            runs = [run + 1 if pool.find(digest) is not None else 0 for run, pool in zip(runs, self.pools)]
            firsts = [self._first_block(kind, (i + 1) * self.page_size) for kind in self.kinds]
            if all(run >= i + 1 - first for run, first in zip(runs, firsts)):
                usable = i + 1
            elif runs[0] <= i and not self.kinds[0].window:
                break  # a global layer lacks a block, so no longer prefix can do
        tables: list[list[int]] = []
        for kind, pool in zip(self.kinds, self.pools):
            first = self._first_block(kind, usable * self.page_size)
            found = [pool.find(digest) for digest in hashes[first:usable]]
            tables.append([NO_BLOCK] * first + [block for block in found if block is not None])
        return tables

    def _hash(self, request: Request, known: int) -> None:
        """Hashes the full blocks of the request's first ``known`` tokens that are not hashed yet."""
        if not self.prefix_cache:
            return
        hashes, size = request.block_hashes, self.page_size
        for i in range(len(hashes), known // size):
            hashes.append(block_hash(hashes[-1] if hashes else 0, request.tokens[i * size : (i + 1) * size]))
