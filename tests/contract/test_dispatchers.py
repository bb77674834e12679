"""The contract of every TokenDispatcher (toolkit/engine/moe/dispatch.py), on 1, 2 and 4 ranks.

With identity experts and weights that sum to one, combine(dispatch(x)) == x, whatever the routing.
"""

from __future__ import annotations

import pytest
import torch

from tests.dist.ranks import run_ranks
from toolkit.config import ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.moe.dispatch import DISPATCHERS, Dispatched, StepRows, make_dispatcher
from toolkit.engine.parallel import Groups

SLOTS, HIDDEN, TOP_K = 8, 24, 3

BACKENDS = ["allgather", "all_to_all"]

# rows of each rank: even, uneven, ranks without any, all on one rank, nobody; few and many
ROWS = {
    1: [(5,), (0,), (40,)],
    2: [(4, 4), (0, 7), (0, 0), (30, 1)],
    4: [(3, 3, 3, 3), (1, 0, 6, 2), (0, 0, 0, 9), (0, 0, 0, 0), (20, 0, 17, 1), (0, 50, 0, 0)],
}
ROUTINGS = ["random", "one_slot", "one_rank", "masked", "all_masked"]


def route(routing: str, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot ids [rows, K], distinct in a row, and weights that sum to one over those that are not masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, SLOTS, generator=generator).argsort(-1)[:, :TOP_K]
    if routing == "one_slot":
        ids = torch.full((rows, TOP_K), -1)
        ids[:, 1] = 5
    elif routing == "one_rank":
        ids = torch.arange(TOP_K).expand(rows, TOP_K).clone()
    elif routing == "masked":
        ids[torch.rand(rows, TOP_K, generator=generator) < 0.4] = -1
    elif routing == "all_masked":
        ids = torch.full((rows, TOP_K), -1)
    weights = torch.rand(rows, TOP_K, generator=generator) + 0.1
    weights = weights * (ids >= 0)
    return ids, weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)


def inputs(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def check_layout(rows: Dispatched, alignment: int) -> None:
    """Slot-major, aligned starts, no overlap, counts within the rows."""
    assert rows.layout == "contiguous"
    end = 0
    for count, start in zip(rows.counts.tolist(), rows.starts.tolist(), strict=True):
        assert start % alignment == 0 and start >= end
        end = start + count
    assert end <= len(rows.x)


def all_cases(groups: Groups, backend: str, alignment: int) -> int:
    """Every routing and row count on one rank; returns how many round trips were checked."""
    size, rank, done = groups.moe.size, groups.moe.rank, 0
    dispatcher = make_dispatcher(backend, groups.moe, SLOTS, alignment, groups.ep_rank, groups.ep_size)
    for dtype in (torch.float32, torch.bfloat16):
        for rows_by_rank in ROWS[size]:
            for routing in ROUTINGS:
                x = inputs(rank, rows_by_rank[rank], dtype)
                ids, weights = route(routing, len(x), seed=rank)
                sent = dispatcher.dispatch_start(x, ids, weights, StepRows(rows_by_rank, is_extend=False))
                rows, handle = dispatcher.dispatch_finish(sent)
                check_layout(rows, alignment)
                check_counts(rows, rows_by_rank, routing, groups)
                out = dispatcher.combine_finish(dispatcher.combine_start(rows.x.clone(), handle))
                expected = torch.where((ids >= 0).any(-1, keepdim=True), x, torch.zeros_like(x))
                tolerance = 1e-6 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
                done += 1
    return done


def check_counts(rows: Dispatched, rows_by_rank: tuple[int, ...], routing: str, groups: Groups) -> None:
    """Each slot received exactly the (token, slot) pairs that all ranks routed to it."""
    ids = torch.cat([route(routing, n, seed=rank)[0] for rank, n in enumerate(rows_by_rank)])
    counts = torch.bincount(ids[ids >= 0].flatten(), minlength=SLOTS).view(groups.ep_size, -1)[groups.ep_rank]
    assert rows.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("alignment", [1, 8])
def test_round_trip(backend: str, ranks: int, alignment: int) -> None:
    dims = ParallelDims.of(ParallelConfig(ranks, ranks, ranks, enable_dp_attention=True))
    results = run_ranks(dims, all_cases, backend, alignment)
    assert results == [2 * len(ROWS[ranks]) * len(ROUTINGS)] * ranks


def scaled_experts(groups: Groups, backend: str) -> bool:
    """Expert s multiplies by s + 1: shows that rows meet their own slots and weights."""
    rank, rows_by_rank = groups.moe.rank, (2, 5, 0, 3)[: groups.moe.size]
    dispatcher = make_dispatcher(backend, groups.moe, SLOTS, 1, groups.ep_rank, groups.ep_size)
    x = inputs(rank, rows_by_rank[rank], torch.float32)
    ids, weights = route("masked", len(x), seed=rank)
    rows, handle = dispatcher.dispatch_finish(
        dispatcher.dispatch_start(x, ids, weights, StepRows(rows_by_rank, is_extend=True))
    )
    first = groups.ep_rank * SLOTS // groups.ep_size
    y = rows.x.clone()
    for slot, (count, start) in enumerate(zip(rows.counts.tolist(), rows.starts.tolist(), strict=True)):
        y[start : start + count] *= first + slot + 1
    out = dispatcher.combine_finish(dispatcher.combine_start(y, handle))
    expected = x * (weights * (ids + 1)).sum(-1, keepdim=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    return True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_meet_their_experts(backend: str, ranks: int) -> None:
    dims = ParallelDims.of(ParallelConfig(ranks, ranks, ranks, enable_dp_attention=True))
    assert all(run_ranks(dims, scaled_experts, backend))


def test_the_suite_runs_over_every_backend() -> None:
    make_dispatcher("allgather", Groups.single().moe, SLOTS, 1, 0, 1)  # registers them
    assert sorted(DISPATCHERS) == sorted(BACKENDS)


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"engine.moe_a2a_backend=alltoall.*all_to_all.*did you mean all_to_all"):
        make_dispatcher("alltoall", Groups.single().moe, SLOTS, 1, 0, 1)
