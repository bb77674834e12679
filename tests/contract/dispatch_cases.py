"""What every TokenDispatcher must do (toolkit/engine/moe/dispatch.py), as functions that run on each rank.

With identity experts and weights that sum to one, combine(dispatch(x)) == x, whatever the routing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.moe.dispatch import Dispatched, ExpertShape, StepRows, TokenDispatcher, make_dispatcher
from toolkit.engine.moe.gemm import dequantize_rows
from toolkit.engine.parallel import Groups

# rows of each rank: even, uneven, ranks without any, all on one rank, nobody; few and many
ROWS = {
    1: [(5,), (0,), (40,)],
    2: [(4, 4), (0, 7), (0, 0), (30, 1)],
    4: [(3, 3, 3, 3), (1, 0, 6, 2), (0, 0, 0, 9), (0, 0, 0, 0), (20, 0, 17, 1), (0, 50, 0, 0)],
}
ROUTINGS = ["random", "one_slot", "one_rank", "masked", "all_masked"]


@dataclass(frozen=True)
class Case:
    """One dispatcher to be held to the contract.

    Attributes:
        tolerance: of a round trip, by the type of the rows.
        is_extend: whether steps count as prefill.
    """

    backend: str
    alignment: int = 1
    device: str = "cpu"
    slots: int = 8
    hidden: int = 24
    top_k: int = 3
    most: int = 64
    engine: EngineConfig = field(default_factory=EngineConfig)
    fp8: bool = False
    is_extend: tuple[bool, ...] = (False,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-6, torch.bfloat16: 2e-2})

    def make(self, groups: Groups) -> TokenDispatcher:
        shape = ExpertShape(
            self.slots, groups.ep_rank, groups.ep_size, self.hidden, self.top_k, self.alignment, self.alignment,
            max_rows=self.most, max_decode_rows=self.most, fp8=self.fp8,
        )  # fmt: skip
        return make_dispatcher(self.backend, groups.moe, shape, self.engine)

    def inputs(self, rank: int, rows: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(rows, self.hidden, generator=torch.Generator().manual_seed(100 + rank))
        return x.to(self.device, dtype)

    def route(self, routing: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Slot ids [rows, K], distinct in a row, and weights that sum to one over those that are not masked."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(rows, self.slots, generator=generator).argsort(-1)[:, : self.top_k]
        if routing == "one_slot":
            ids = torch.full((rows, self.top_k), -1)
            ids[:, 1] = 5
        elif routing == "one_rank":
            ids = torch.arange(self.top_k).expand(rows, self.top_k).clone()
        elif routing == "masked":
            ids[torch.rand(rows, self.top_k, generator=generator) < 0.4] = -1
        elif routing == "all_masked":
            ids = torch.full((rows, self.top_k), -1)
        weights = torch.rand(rows, self.top_k, generator=generator) + 0.1
        weights = weights * (ids >= 0)
        return ids.to(self.device), (weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)).to(self.device)


def round_trips(groups: Groups, case: Case) -> int:
    """Every routing and row count on one rank; returns how many round trips were checked."""
    size, rank, done = groups.moe.size, groups.moe.rank, 0
    dispatcher = case.make(groups)
    for dtype in case.dtypes:
        for rows_by_rank in ROWS[size]:
            for routing in ROUTINGS:
                for is_extend in case.is_extend:
                    x = case.inputs(rank, rows_by_rank[rank], dtype)
                    ids, weights = case.route(routing, len(x), seed=rank)
                    sent = dispatcher.dispatch_start(x, ids, weights, StepRows(rows_by_rank, is_extend))
                    rows, handle = dispatcher.dispatch_finish(sent)
                    check_layout(rows, case.alignment)
                    check_counts(case, rows, rows_by_rank, routing, groups)
                    y = identity(rows, factors=[1.0] * (case.slots // groups.ep_size))
                    out = dispatcher.combine_finish(dispatcher.combine_start(y, handle))
                    expected = torch.where((ids >= 0).any(-1, keepdim=True), x, torch.zeros_like(x))
                    tolerance = case.tolerance[dtype]
                    where = f"{dtype} {rows_by_rank} {routing} {is_extend=}"
                    torch.testing.assert_close(
                        out, expected, rtol=tolerance, atol=tolerance, msg=lambda m, where=where: f"{where}: {m}"
                    )
                    done += 1
    return done


def rows_meet_their_experts(groups: Groups, case: Case) -> int:
    """Expert s multiplies by s + 1: rows meet their own slots and weights. Returns how many steps were checked."""
    rank, rows_by_rank = groups.moe.rank, (2, 5, 0, 3)[: groups.moe.size]
    dispatcher, dtype, done = case.make(groups), case.dtypes[0], 0
    for is_extend in case.is_extend:
        x = case.inputs(rank, rows_by_rank[rank], dtype)
        ids, weights = case.route("masked", len(x), seed=rank)
        step = StepRows(rows_by_rank, is_extend)
        rows, handle = dispatcher.dispatch_finish(dispatcher.dispatch_start(x, ids, weights, step))
        local = case.slots // groups.ep_size
        y = identity(rows, [float(groups.ep_rank * local + slot + 1) for slot in range(local)])
        out = dispatcher.combine_finish(dispatcher.combine_start(y, handle))
        expected = x.float() * (weights * (ids + 1)).sum(-1, keepdim=True)
        tolerance = max(1e-5, case.tolerance[dtype])
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * case.slots)
        done += 1
    return done


def identity(rows: Dispatched, factors: list[float]) -> Tensor:
    """What experts return that multiply by ``factors`` and keep to ``Dispatched.weights``; junk in padding rows."""
    x = rows.x if rows.scales is None else dequantize_rows(rows.x, rows.scales)
    y = torch.full_like(x, float("nan"))
    for slot, (count, start) in enumerate(zip(rows.counts.tolist(), rows.starts.tolist(), strict=True)):
        given, made = (x[slot], y[slot]) if rows.layout == "masked" else (x[start:], y[start:])
        made[:count] = given[:count] * factors[slot]
        if rows.weights is not None:
            made[:count] *= rows.weights[start : start + count, None].to(y.dtype)
    return y


def check_layout(rows: Dispatched, alignment: int) -> None:
    """Contiguous: slot-major, each slot at the next aligned row. Masked: counts within the rows."""
    end = 0
    for count, start in zip(rows.counts.tolist(), rows.starts.tolist(), strict=True):
        if rows.layout == "masked":
            assert start == 0 and count <= rows.x.shape[1]
            continue
        assert rows.alignment == alignment and start == -(-end // alignment) * alignment
        end = start + count
    assert rows.layout == "masked" or end <= len(rows.x)
    assert rows.expected >= 1


def check_counts(case: Case, rows: Dispatched, rows_by_rank: tuple[int, ...], routing: str, groups: Groups) -> None:
    """Each slot received exactly the (token, slot) pairs that all ranks routed to it."""
    ids = torch.cat([case.route(routing, n, seed=rank)[0] for rank, n in enumerate(rows_by_rank)])
    counts = torch.bincount(ids[ids >= 0].flatten(), minlength=case.slots).view(groups.ep_size, -1)[groups.ep_rank]
    assert rows.counts.tolist() == counts.tolist()
