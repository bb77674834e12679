"""Which bytes of a peer's KV cache belong where: for any two mappings, every head's rows arrive, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.engine.disagg.log import covered
from toolkit.engine.kv.layout import Blocks, CacheLayout, mismatch, pieces, sources

PAGE, BLOCKS, K_DIM, V_DIM = 4, 12, 3, 2
LAYERS = [[0, 2], [1]]  # of a global kind and a sliding one


def layouts(total_heads: int, ranks: int, v_dim: int = V_DIM) -> list[CacheLayout]:
    """As grouped-query attention splits ``total_heads`` over ``ranks``."""
    shards = min(ranks, total_heads)
    heads = total_heads // shards
    firsts = [rank * shards // ranks * heads for rank in range(ranks)]
    return [
        CacheLayout(PAGE, "float32", heads, first, total_heads, K_DIM, v_dim, [0, 5], LAYERS, [BLOCKS, BLOCKS])
        for first in firsts
    ]


def whole(layout: CacheLayout, seed: int) -> list[torch.Tensor]:
    """Regions with all heads: random, or zeros for seed 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BLOCKS * PAGE, layout.total_heads, dim) for kind in LAYERS for _ in kind for dim in layout.dims]
    return [torch.rand(shape, generator=generator) if seed else torch.zeros(shape) for shape in shapes]


def part(layout: CacheLayout, regions: list[torch.Tensor]) -> list[torch.Tensor]:
    heads = slice(layout.first_head, layout.first_head + layout.heads)
    return [region[:, heads].contiguous() for region in regions]


def copy(rows: np.ndarray, to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    for region, offset, peer_region, peer_offset, size in rows.tolist():
        here, there = (t.view(-1).view(torch.uint8) for t in (to[region], source[peer_region]))
        assert offset + size <= len(here) and peer_offset + size <= len(there)
        here[offset : offset + size] = there[peer_offset : peer_offset + size]


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(4, 1, 2), (4, 2, 1), (4, 4, 2), (2, 4, 1), (2, 1, 4), (1, 2, 4), (8, 2, 8), (3, 1, 3)]),
    v_dim=st.sampled_from([0, V_DIM]),
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 6),
)
def test_every_rank_gets_its_heads_of_the_wanted_blocks(
    heads: tuple[int, int, int], v_dim: int, seed: int, count: int
) -> None:
    total, prefill, decode = heads
    rng = np.random.default_rng(seed)
    there = layouts(total, prefill, v_dim)
    filled = whole(there[0], 1)
    wanted = [Blocks(rng.permutation(BLOCKS)[:n].tolist(), rng.permutation(BLOCKS)[:n].tolist()) for n in (count, 1)]
    expected = whole(there[0], 0)
    for region, (tensor, source) in enumerate(zip(expected, filled)):
        kind = wanted[0 if region < len(LAYERS[0]) * len(there[0].dims) else 1]
        for mine, theirs in zip(kind.mine, kind.theirs):
            tensor[mine * PAGE : (mine + 1) * PAGE] = source[theirs * PAGE : (theirs + 1) * PAGE]
    for rank, layout in enumerate(layouts(total, decode, v_dim)):
        got = part(layout, whole(layout, 0))
        for i in sources(layout, rank, there):
            copy(pieces(layout, there[i], wanted), got, part(there[i], filled))
        assert all(torch.equal(a, b) for a, b in zip(got, part(layout, expected)))


def test_adjacent_blocks_are_one_piece() -> None:
    (layout,) = layouts(4, 1)
    rows = pieces(layout, layout, [Blocks([3, 4, 5, 9], [6, 7, 8, 9]), Blocks([], [])])
    assert len(rows) == 2 * 2 * 2, "two runs in the keys and values of two layers"
    assert rows[:, 4].sum() == 2 * 4 * PAGE * 4 * (K_DIM + V_DIM) * 4


def test_readers_spread_over_copies_and_the_leader_reads_from_the_leader() -> None:
    mine, theirs = layouts(1, 4), layouts(1, 4)
    assert [sources(layout, rank, theirs) for rank, layout in enumerate(mine)] == [[0], [1], [2], [3]]
    assert sources(layouts(8, 1)[0], 0, layouts(8, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("field", "value"), [("page_size", 8), ("dtype", "bfloat16"), ("total_heads", 2)])
def test_what_must_be_alike_is_named(field: str, value: object) -> None:
    import msgspec

    (layout,) = layouts(4, 1)
    other = msgspec.structs.replace(layout, **{field: value})
    assert field in mismatch(layout, other) and str(value) in mismatch(layout, other)
    assert mismatch(layout, layout) == ""


def test_time_is_covered_once() -> None:
    assert covered([]) == 0
    assert covered([(1, 3), (2, 4), (6, 7), (6.5, 6.6)]) == 4
    assert covered([(5, 4)]) == 0, "what ends before it begins takes no time"
