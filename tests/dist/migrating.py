"""Experts migrate on every rank between forced steps: the worker's turn, without its sockets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.dist.cases import PROMPT, Case, check_close
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.agree import Proposal, agree
from toolkit.engine.arch import context_length, read_arch
from toolkit.engine.core import SamplingParams
from toolkit.engine.eplb.manager import Manager
from toolkit.engine.eplb.setup import make_manager, make_recorder
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Scheduler


@dataclass
class Migrated:
    """What one rank ends with."""

    rebalances: int
    aborted: int
    failure: str
    placement: list[list[int]]
    addresses_kept: bool
    weights_right: bool


class Rank:
    """Runner, recorder, manager and scheduler of one rank."""

    def __init__(
        self, groups: Groups, model: ModelConfig, engine: EngineConfig, folder: Path, nodes: int = 1,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.groups, self.engine, self.arch = groups, engine, read_arch(model)
        self.runner = ModelRunner(model, self.arch, engine, groups, device, nodes=nodes)
        moe = self.runner.moe
        moe.recorder = make_recorder(self.arch, moe, str(folder / "experts.npz"), device)
        made = make_manager(self.arch, moe, moe.recorder, folder)
        assert made is not None
        self.manager: Manager = made
        tables = BlockTables(self.runner.cache.kinds, engine.page_size, not engine.disable_radix_cache)
        self.scheduler = Scheduler(
            tables, engine.chunked_prefill_size, engine.max_running_requests, context_length(self.arch, engine)
        )
        self.steps = 0
        self.started = [[(t.data_ptr(), t.clone()) for t in layer.slot_tensors()] for layer in moe.layers]
        self.first = moe.placement.phy2log_LP.copy()

    def turn(self, more: bool = True) -> bool:
        """One turn of the worker's loop; False when nobody has anything to do. ``more``: requests will still come."""
        batch = self.scheduler.schedule() if more else None
        tokens = batch.num_tokens if batch else 0
        overlaps = self.engine.enable_two_batch_overlap
        half = split(batch)[0].num_tokens if overlaps and batch else -1
        mine = Proposal(tokens, tokens, bool(batch and batch.prefill), half, experts=self.manager.proposal)
        agreed = agree(self.groups.tp_cpu, self.groups.dims, self.steps, mine)
        self.manager.turn(agreed.experts, self.steps)
        if any(agreed.ctx.dp_tokens):
            assert batch is not None and self.runner.moe.recorder is not None
            self.runner.moe.recorder.begin_pass(batch)
            self.run(batch, agreed.ctx)
            self.runner.moe.recorder.end_of_pass()
            self.steps += 1
            return True
        if any(agreed.experts):
            self.manager.nap()
            return True
        return False

    def run(self, batch, ctx) -> None:
        raise NotImplementedError

    @property
    def ended(self) -> int:
        """Rebalances that ended, one way or the other; alike on all ranks in a turn."""
        stats = self.manager.stats()
        return stats.rebalances_total + stats.aborted_total

    def addresses_kept(self) -> bool:
        now = [[t.data_ptr() for t in layer.slot_tensors()] for layer in self.runner.moe.layers]
        return now == [[address for address, _ in layer] for layer in self.started]

    def weights_right(self) -> bool:
        """Every slot of every rank has bit by bit the weights that its expert had at the start, wherever that was."""
        placement, comm = self.runner.moe.placement, self.groups.experts
        for index, layer in enumerate(self.runner.moe.layers):
            for now, (_, began) in zip(layer.slot_tensors(), self.started[index]):
                slots_now, slots_began = (comm.all_gather(t.flatten(1).view(torch.uint8)) for t in (now, began))
                parts = self.groups.dims.moe_tp  # ranks of a slot's parts: compare like with like
                now_R = slots_now.unflatten(0, (placement.ep_size, parts, -1)).transpose(0, 1).flatten(1, 2)
                began_R = slots_began.unflatten(0, (placement.ep_size, parts, -1)).transpose(0, 1).flatten(1, 2)
                where = {int(expert): slot for slot, expert in enumerate(self.first[index])}
                source = [where[int(expert)] for expert in placement.phy2log_LP[index]]
                if not torch.equal(now_R, began_R[:, source]):
                    return False
        return True


class ForcedRank(Rank):
    """Serves sequences with their tokens forced, and keeps the logits of every position."""

    def serve(self, sequences: list[list[int]], prompt_len: int) -> None:
        dims, dp_rank = self.groups.dims, self.groups.dims.dp_rank(self.groups.rank)
        self.sequences = sequences
        mine = [i for i in range(len(sequences)) if i % dims.dp_size == dp_rank]
        for i in mine:
            output = SamplingParams(max_tokens=len(sequences[i]) - prompt_len)
            assert self.scheduler.add(str(i), sequences[i][:prompt_len], output) is None
        self.logits: dict[int, dict[int, np.ndarray]] = {i: {} for i in mine}

    def run(self, batch, ctx) -> None:
        hidden = self.runner.hidden(batch, ctx)
        rows = self.runner.model.logits(hidden, ctx.dp_logit_rows)
        forced, first = [], 0
        for scheduled in batch.scheduled:
            request = scheduled.request
            for j in range(scheduled.num_tokens):
                self.logits[int(request.rid)][request.num_computed + j] = rows[first + j].numpy().copy()
            first += scheduled.num_tokens
            if scheduled.samples:
                forced.append(self.sequences[int(request.rid)][len(request.tokens)])
        self.scheduler.finish(batch, forced)


def random_placement(layers: int, experts: int, slots: int, seed: int) -> np.ndarray:
    """Every expert at least once, copies and slots at random: nearly everything has to move."""
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]) for _ in range(layers)]
    return np.stack([rng.permutation(row) for row in rows])


def migrate_under_load(
    groups: Groups, case: Case, engine: EngineConfig, folder: Path, times: int, nodes: int = 1,
    sabotage: tuple[int, int] | None = None,
) -> Migrated:  # fmt: skip
    """Serves the case again and again, checking its logits, while one random placement after the other is asked for.

    Args:
        sabotage: (rank, chunk): there, posting the transfers raises.
    """
    rank = ForcedRank(groups, case.model, engine, folder, nodes)
    if sabotage is not None and sabotage[0] == groups.rank:
        _sabotage(rank, sabotage[1])
    arch = rank.arch
    for seed in range(times):
        placement = random_placement(len(arch.moe_layers), arch.num_experts, arch.slots(engine), seed)
        rank.manager.request(json.dumps({"physical_to_logical_map": placement.tolist()}))
        ended = rank.ended
        while not rank.manager.stats().chunks:  # so that the requests come while experts move
            rank.turn(more=False)
        while rank.ended == ended:
            rank.serve(case.sequences, PROMPT)
            while rank.turn():
                pass
            for i, rows in rank.logits.items():
                check_close(rows, case.expected[i])
            rank.scheduler.flush_cache()
    assert rank.runner.moe.recorder is not None
    rank.runner.moe.recorder.flush()
    stats = rank.manager.stats()
    rank.manager.close()
    return Migrated(
        stats.rebalances_total, stats.aborted_total, stats.reason, rank.runner.moe.placement.phy2log_LP.tolist(),
        rank.addresses_kept(), rank.weights_right(),
    )  # fmt: skip


def _sabotage(rank: Rank, chunk: int) -> None:
    mover, real = rank.manager._mover, rank.manager._mover._post
    calls = iter(range(1000))

    def post(moves, made):
        if next(calls) == chunk:
            raise RuntimeError("out of spare buffers")
        return real(moves, made)

    mover._post = post  # type: ignore[method-assign]
