"""A round trip held by a CUDA graph, run on each rank: replays follow new rows and new routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.contract.dispatch_cases import ROWS, Case
from toolkit.engine.layers import RMSNorm
from toolkit.engine.moe.dispatch import CombinesLate, StepRows, TokenDispatcher
from toolkit.engine.moe.gemm import dequantize_rows
from toolkit.engine.parallel import Groups


def graph_follows_its_inputs(groups: Groups, case: Case, rows: int) -> int:
    """Captures identity experts between dispatch and combine; returns how many replays were checked."""
    dispatcher, rank = case.make(groups), groups.moe.rank
    step = StepRows((rows,) * groups.moe.size, is_extend=False)
    assert dispatcher.capturable(step)
    x = case.inputs(rank, rows, torch.bfloat16)
    ids, weights = case.route("random", rows, seed=rank)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _round_trip(dispatcher, x, ids, weights, step)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _round_trip(dispatcher, x, ids, weights, step)
    for seed, routing in enumerate(("random", "masked", "one_rank", "all_masked", "random")):
        x.copy_(case.inputs(10 * seed + rank, rows, torch.bfloat16))
        new_ids, new_weights = case.route(routing, rows, seed=7 * seed + rank)
        ids.copy_(new_ids)
        weights.copy_(new_weights)
        graph.replay()
        torch.cuda.synchronize()
        expected = torch.where((ids >= 0).any(-1, keepdim=True), x, torch.zeros_like(x))
        tolerance = case.tolerance[torch.bfloat16]
        torch.testing.assert_close(
            out, expected, rtol=tolerance, atol=tolerance, msg=lambda m, r=routing: f"replay {r}: {m}"
        )
    return 5


def sums_go_on_to_the_norm(groups: Groups, case: Case) -> int:
    """What combine leaves to the next norm is what it gives alone; returns how many steps were checked."""
    dispatcher, rank = case.make(groups), groups.moe.rank
    assert isinstance(dispatcher, CombinesLate)
    norm = RMSNorm(_Weight(), "norm", case.hidden, 1e-6)  # type: ignore[arg-type]
    for done, rows_by_rank in enumerate(ROWS[groups.moe.size]):
        x = case.inputs(rank, rows_by_rank[rank], torch.bfloat16)
        ids, weights = case.route("masked", len(x), seed=done + rank)
        step, residual, shared = StepRows(rows_by_rank, False), x.flip(0) + 1, 2 * x if done % 2 else None
        alone = _round_trip(dispatcher, x, ids, weights, step)
        handle = _until_combine(dispatcher, x, ids, weights, step)
        assert dispatcher.is_late(handle)
        total, normed = dispatcher.combine_late(handle, shared).into(residual, norm)
        wanted = norm.add(residual, alone if shared is None else alone + shared)
        torch.testing.assert_close(total, wanted[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(normed, wanted[1], rtol=2e-2, atol=2e-2)
        handle = _until_combine(dispatcher, x, ids, weights, step)
        torch.testing.assert_close(dispatcher.combine_late(handle, None).alone(), alone, rtol=1e-2, atol=1e-2)
    return len(ROWS[groups.moe.size])


class _Weight:
    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.linspace(0.5, 1.5, *shape, device="cuda").to(torch.bfloat16)


def _round_trip(dispatcher: TokenDispatcher, x: Tensor, ids: Tensor, weights: Tensor, step: StepRows) -> Tensor:
    return dispatcher.combine_finish(_until_combine(dispatcher, x, ids, weights, step))


def _until_combine(dispatcher: TokenDispatcher, x: Tensor, ids: Tensor, weights: Tensor, step: StepRows) -> Any:
    rows, handle = dispatcher.dispatch_finish(dispatcher.dispatch_start(x, ids, weights, step))
    y = rows.x if rows.scales is None else dequantize_rows(rows.x, rows.scales)
    if rows.weights is not None:
        y = (y * rows.weights[:, None]).to(torch.bfloat16)
    return dispatcher.combine_start(y.contiguous(), handle)
