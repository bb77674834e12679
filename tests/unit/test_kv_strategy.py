"""The ways between kinds of storage, and the copies that are refused."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from toolkit.engine.kv.strategy import (
    Capabilities,
    Direct,
    Storage,
    TwoHop,
    check_blocks,
    hops,
    local_strategy,
    remote_strategy,
)

KINDS = get_args(Storage)
HOPS = TwoHop("nixl_read", "nixl_write")
RDMA, GDS = Capabilities(allow_gpu_rdma=True), Capabilities(allow_gds=True)


def test_there_is_a_way_between_any_two_storages_of_a_host() -> None:
    for source, to in itertools.product(KINDS, KINDS):
        found = local_strategy(source, to)
        touches_disk, touches_gpu = "disk" in (source, to), "device" in (source, to)
        ways = [found.way] if isinstance(found, Direct) else [found.first, found.second]
        assert any(way.startswith("nixl") for way in ways) == touches_disk, (source, to)
        assert any(way.startswith("cuda") for way in ways) == touches_gpu, (source, to)


def test_direct_storage_spares_the_second_hop() -> None:
    assert local_strategy("device", "disk") == TwoHop("cuda_async_d2h", "nixl_write")
    assert local_strategy("device", "disk", GDS) == Direct("nixl_write")
    assert local_strategy("disk", "device", GDS) == Direct("nixl_read")
    assert local_strategy("disk", "disk", GDS) == TwoHop("nixl_read", "nixl_write")


def test_nixl_can_be_preferred_where_it_does_the_same() -> None:
    assert local_strategy("system", "pinned", prefer="nixl") == Direct("nixl_write")
    assert local_strategy("pinned", "device", prefer="nixl") == Direct("cuda_async_h2d")
    assert local_strategy("pinned", "device", RDMA, prefer="nixl") == Direct("nixl_write")
    assert local_strategy("system", "pinned", prefer="native") == Direct("memcpy")


@pytest.mark.parametrize(
    ("source", "to", "direction", "can", "expected"),
    [
        ("pinned", "system", "read", Capabilities(), Direct("nixl_read")),
        ("device", "device", "read", RDMA, Direct("nixl_read")),
        ("pinned", "device", "read", Capabilities(), TwoHop("nixl_read", "cuda_async_h2d")),
        ("device", "pinned", "write", Capabilities(), TwoHop("cuda_async_d2h", "nixl_write")),
        ("device", "device", "write", RDMA, Direct("nixl_write")),
        ("disk", "system", "write", RDMA, TwoHop("nixl_read", "nixl_write")),
    ],
)
def test_between_hosts(source: Any, to: Any, direction: Any, can: Capabilities, expected: object) -> None:
    assert remote_strategy(source, to, direction, can) == expected


@pytest.mark.parametrize(
    ("source", "to", "direction", "message"),
    [
        ("device", "system", "read", "without allow_gpu_rdma"),
        ("system", "device", "write", "without allow_gpu_rdma"),
        ("disk", "system", "read", "a peer's disk"),
        ("system", "disk", "write", "a peer's disk"),
    ],
)
def test_no_way_between_hosts_is_said(source: Any, to: Any, direction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remote_strategy(source, to, direction)


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ({"source": [1], "to": [1, 2]}, "1 source blocks for 2"),
        ({"source": [1, 2], "to": [3, 3]}, "block 3 is written twice"),
        ({"source": [9], "to": [1]}, "source block 9 is not within 0 and 7"),
        ({"source": [1], "to": [-1]}, "destination block -1"),
        ({"source": [1, 2], "to": [2, 3], "same_storage": True}, "block 2 is both"),
        ({"source": [1], "to": [1], "strategy": HOPS}, "needs at least one bounce"),
        ({"source": [1], "to": [1], "strategy": HOPS, "bounce": [4, 4]}, "block 4 is given"),
    ],
)  # fmt: skip
def test_a_wrong_copy_is_refused(copy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_blocks(num_source=8, num_to=8, **copy)


def test_a_right_copy_is_not() -> None:
    check_blocks([1, 1, 2], [3, 4, 5], 8, 8, same_storage=True)
    check_blocks([1], [1], 8, 8, strategy=TwoHop("nixl_read", "nixl_write"), bounce=[0])


@pytest.mark.parametrize("num_bounce", [1, 2, 3, 6])
def test_two_hops_use_a_bounce_block_once_a_batch_and_in_turns(num_bounce: int) -> None:
    batches = hops(11, num_bounce)
    assert [block for batch in batches for block, _ in batch] == list(range(11))
    for before, after in itertools.pairwise(batches):
        used = [bounce for _, bounce in before]
        assert len(set(used)) == len(used) and max(used) < num_bounce
        assert num_bounce == 1 or not set(used) & {bounce for _, bounce in after}, "one half is filled meanwhile"
