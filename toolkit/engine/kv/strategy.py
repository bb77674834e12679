"""Which way KV blocks go between two kinds of storage: a table, and the checks on what is to be copied.

The table is Dynamo's (lib/llm/src/block_manager/v2/physical/transfer): copies on one host go straight or, where the
hardware has no direct path, in two hops through pinned memory; between hosts NIXL does it. Pure data and arithmetic;
who copies is ``local.py``, ``nixl.py`` or CUDA. Read next: ``transfer.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Storage = Literal["system", "pinned", "device", "disk"]
Way = Literal[
    "memcpy", "cuda_async_h2d", "cuda_async_d2h", "cuda_async_d2d", "cuda_blocking_h2d", "cuda_blocking_d2h",
    "nixl_read", "nixl_write",
]  # fmt: skip
Preference = Literal["automatic", "native", "nixl"]


@dataclass(frozen=True)
class Direct:
    """One copy."""

    way: Way


@dataclass(frozen=True)
class TwoHop:
    """Two copies, through a bounce buffer of kind ``via``."""

    first: Way
    second: Way
    via: Storage = "pinned"


Strategy = Direct | TwoHop


@dataclass(frozen=True)
class Capabilities:
    """What the host can do. Off unless known.

    Attributes:
        allow_gpu_rdma: a network card reads and writes GPU memory.
        allow_gds: the disk does (GPUDirect Storage).
    """

    allow_gpu_rdma: bool = False
    allow_gds: bool = False


LOCAL: dict[tuple[Storage, Storage], Strategy] = {
    ("system", "system"): Direct("memcpy"),
    ("system", "pinned"): Direct("memcpy"),
    ("system", "device"): Direct("cuda_blocking_h2d"),
    ("system", "disk"): Direct("nixl_write"),
    ("pinned", "system"): Direct("memcpy"),
    ("pinned", "pinned"): Direct("memcpy"),
    ("pinned", "device"): Direct("cuda_async_h2d"),
    ("pinned", "disk"): Direct("nixl_write"),
    ("device", "system"): Direct("cuda_blocking_d2h"),
    ("device", "pinned"): Direct("cuda_async_d2h"),
    ("device", "device"): Direct("cuda_async_d2d"),
    ("device", "disk"): TwoHop("cuda_async_d2h", "nixl_write"),
    ("disk", "system"): Direct("nixl_read"),
    ("disk", "pinned"): Direct("nixl_read"),
    ("disk", "device"): TwoHop("nixl_read", "cuda_async_h2d"),
    ("disk", "disk"): TwoHop("nixl_read", "nixl_write"),
}
WITH_GDS: dict[tuple[Storage, Storage], Strategy] = {
    ("device", "disk"): Direct("nixl_write"),
    ("disk", "device"): Direct("nixl_read"),
}
# To write into a peer. A read from one goes straight into what is here, or is refused.
REMOTE_WRITE: dict[Storage, Strategy] = {
    "system": Direct("nixl_write"),
    "pinned": Direct("nixl_write"),
    "device": TwoHop("cuda_async_d2h", "nixl_write"),
    "disk": TwoHop("nixl_read", "nixl_write"),
}
REMOTE_WRITE_WITH_RDMA: dict[Storage, Strategy] = {"device": Direct("nixl_write")}


def local_strategy(
    source: Storage, to: Storage, can: Capabilities = Capabilities(), prefer: Preference = "automatic"
) -> Strategy:
    """The way between two storages of one host.

    ``prefer``: nixl: also between memories of the host, where both it and a native copy do; native: the table's own.
    """
    if can.allow_gds and (source, to) in WITH_GDS:
        return WITH_GDS[source, to]
    found = LOCAL[source, to]
    on_host = {source, to} <= {"system", "pinned"}
    if prefer == "nixl" and (on_host or (can.allow_gpu_rdma and "disk" not in (source, to))):
        return Direct("nixl_write")
    return found


def remote_strategy(
    source: Storage, to: Storage, direction: Literal["read", "write"], can: Capabilities = Capabilities()
) -> Strategy:
    """The way between hosts. ``read``: ``source`` is the peer's, ``to`` here; ``write``: the other way round.

    Raises:
        ValueError: there is no way; what would open one.
    """
    theirs, ours = (source, to) if direction == "read" else (to, source)
    if theirs == "disk":
        raise ValueError(f"a peer's disk cannot be reached ({direction} {source} -> {to}): have it staged in memory")
    if theirs == "device" and not can.allow_gpu_rdma:
        raise ValueError(
            f"a peer's GPU memory cannot be reached without allow_gpu_rdma ({direction} {source} -> {to}): set it "
            "where the network card can, or have the blocks staged in pinned memory"
        )
    if direction == "write":
        if can.allow_gpu_rdma and ours in REMOTE_WRITE_WITH_RDMA:
            return REMOTE_WRITE_WITH_RDMA[ours]
        return REMOTE_WRITE[ours]
    if ours == "device" and not can.allow_gpu_rdma:
        return TwoHop("nixl_read", "cuda_async_h2d")
    if ours == "disk":
        return TwoHop("nixl_read", "nixl_write")
    return Direct("nixl_read")


def check_blocks(
    source: Sequence[int],
    to: Sequence[int],
    num_source: int,
    num_to: int,
    same_storage: bool = False,
    bounce: Collection[int] | None = None,
    strategy: Strategy | None = None,
) -> None:
    """Refuses a copy of blocks ``source[i]`` to ``to[i]`` that cannot be right.

    Args:
        num_source, num_to: blocks that the two sides have.
        same_storage: both sides are the same blocks, so that none may be read and written.
        bounce: blocks of the bounce buffer, for a ``TwoHop``.

    Raises:
        ValueError: lengths differ, an id is out of range, a block is written twice, or read and written at once; or a
            two-hop copy has no bounce block, or one twice.
    """
    if len(source) != len(to):
        raise ValueError(f"{len(source)} source blocks for {len(to)} destinations: one for each")
    for name, ids, count in (("source", source, num_source), ("destination", to, num_to)):
        if outside := [i for i in ids if not 0 <= i < count]:
            raise ValueError(f"{name} block {outside[0]} is not within 0 and {count - 1}")
    if len(set(to)) != len(to):
        raise ValueError(f"destination block {_repeated(to)} is written twice")
    if same_storage and (both := set(source) & set(to)):
        raise ValueError(f"block {min(both)} is both read and written: copy through other blocks")
    if isinstance(strategy, TwoHop):
        if not bounce:
            raise ValueError(f"{strategy} needs at least one bounce block in {strategy.via} memory")
        if len(set(bounce)) != len(bounce):
            raise ValueError(f"bounce block {_repeated(list(bounce))} is given twice")


def hops(count: int, num_bounce: int) -> list[list[tuple[int, int]]]:
    """How ``count`` blocks go through ``num_bounce`` bounce blocks: batches of (block, bounce block).

    With two and more, the bounce blocks are two halves that take turns: one is filled while the other is emptied.
    """
    size = max(num_bounce // 2, 1)
    halves = [list(range(size)), list(range(size, 2 * size))] if num_bounce > 1 else [[0]]
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return [list(zip(batch, halves[i % len(halves)])) for i, batch in enumerate(batches)]


def _repeated(ids: Sequence[int]) -> int:
    seen: set[int] = set()
    return next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
