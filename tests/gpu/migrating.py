"""One rank on a GPU whose experts migrate while it serves: graphs, steps launched ahead, the worker's turn.

The same requests again and again, their experts and tokens forced (``forced_routes.py``): between two runs the logits
of a position may differ by rounding only, whatever the placement, and by much more where one row of one layer goes to
a wrong expert. How much more is measured in the end, on a map that is made wrong.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.dist.migrating import Rank, _sabotage, random_placement
from tests.gpu.forced_routes import Rows, force, furthest
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.agree import Proposal, agree
from toolkit.engine.core import SamplingParams
from toolkit.engine.eplb import transfers
from toolkit.engine.eplb.manager import READY
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.prepare import prepare
from toolkit.records.experts import read_experts

REQUESTS, PROMPT, OUTPUT = 6, 40, 32
SPIN = 600_000_000  # cycles, about 0.3 s: what the host must not wait for
WINDOWS = 3  # ends of windows at which that is looked at


@dataclass
class Result:
    """What one rank found."""

    rebalances: int
    aborted: int
    placements: list[list[list[int]]]
    addresses_kept: bool
    weights_right: bool
    graphs: tuple[int, ...]
    direct: bool
    error: float  # the largest of a position's logits, relative, before, while and after experts moved
    error_of_a_wrong_map: float  # the same when two experts of one layer have changed names
    moving_steps: int
    waited: list[str]  # what of a rebalance waited on the host for the step under way
    watched: int  # how often that was looked at
    cleanly_counted: bool


class GpuRank(Rank):
    """Warm, with graphs where the engine's options allow them."""

    def __init__(self, groups: Groups, model: ModelConfig, engine: EngineConfig, folder: Path, device: str) -> None:
        super().__init__(groups, model, engine, folder, device=device)
        recorder = self.runner.moe.recorder
        assert recorder is not None
        self.recorder, recorder.recording = recorder, False
        self.sampler = force(self.runner)
        prepare(self.runner, lambda stage, done, total: None)
        self.sampler.take()
        recorder.start()
        self.maps = self._maps()
        self.scheduler = self.runner.new_scheduler()
        self.pipeline = Pipeline(self.runner, self.scheduler, device != "cpu", self._over)
        self.texts: dict[str, list[int]] = {}
        self.moving_steps = self.watched = self.windows = 0
        self.watching, self.waited = False, list[str]()

    def turn(self, more: bool = True) -> bool:
        self.pipeline.before_schedule()
        batch = self.scheduler.schedule()
        mine = Proposal(
            batch.num_tokens, batch.num_logit_rows, bool(batch.prefill), -1, experts=self.manager.proposal
        )  # fmt: skip
        agreed = agree(self.groups.tp_cpu, self.groups.dims, self.steps, mine)
        acts = all(said == READY for said in (agreed.experts if self.manager.moving else agreed.experts[:1]))
        with self._nothing_waits("a start or a commit", acts):
            self.manager.turn(agreed.experts, self.steps)
        if any(agreed.ctx.dp_tokens):
            self.recorder.begin_pass(batch)
            self.pipeline.launch(batch, agreed.ctx)
            ends = self.recorder._passes + 1 == self.recorder.window
            self.windows += ends and self.watching
            with self._nothing_waits("the end of a window", ends and self.windows <= WINDOWS):
                self.recorder.end_of_pass()
            self.steps += 1
            self.moving_steps += self.manager.moving
            return True
        self.pipeline.drain()
        if any(agreed.experts):
            self.manager.nap()
            return True
        return False

    @contextlib.contextmanager
    def _nothing_waits(self, what: str, now: bool) -> Iterator[None]:
        """Has the device spin on the stream of the steps, and looks whether it still does when the host comes back."""
        if not (now and self.watching and self.runner.device != "cpu"):
            yield
            return
        over = torch.cuda.Event()
        torch.cuda._sleep(SPIN)
        over.record()
        yield
        self.watched += 1
        self.waited += [what] if over.query() else []

    def serve(self) -> Rows:
        """The logits of this rank's requests, whatever experts do."""
        self.texts = {}
        for i in range(REQUESTS):
            prompt = [(7 * i + 31 * self.groups.rank + 3 * j) % 500 for j in range(PROMPT + i)]
            assert self.scheduler.add(str(i), prompt, SamplingParams(max_tokens=OUTPUT)) is None
        while self.turn():
            pass
        self.scheduler.flush_cache()
        assert [len(text) for text in self.texts.values()] == [OUTPUT] * REQUESTS
        return self.sampler.take()

    def _over(self, step: Step) -> None:
        for output in step.outputs:
            self.texts.setdefault(output.rid, []).extend(output.token_ids)

    def rename_two_experts(self) -> None:
        """A map that is wrong in the first layer: two experts of different ranks under each other's name."""
        placement = self.runner.moe.placement
        row = placement.phy2log_LP[0].copy()
        a, b = row[0], next(expert for expert in row[::-1] if expert != row[0])
        placement.update(0, placement.prepare(np.where(row == a, b, np.where(row == b, a, row))))

    def addresses_kept(self) -> bool:
        return super().addresses_kept() and self._maps() == self.maps

    def _maps(self) -> list[int]:
        return [t.data_ptr() for t in vars(self.runner.moe.placement._choice).values() if torch.is_tensor(t)]


def migrate_on_gpus(
    groups: Groups, config: dict[str, Any], engine: EngineConfig, folder: Path, times: int,
    sabotage: int | None = None, direct: bool = True,
) -> Result:  # fmt: skip
    """Serves the same requests at rest, then while random placements come one after the other.

    Args:
        direct: False: as where GPUs cannot open each other's memory.
        sabotage: one more rebalance, in which the last rank cannot post the transfers of this chunk.
    """
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    if not direct:
        transfers._open_peers = lambda *_: {}  # type: ignore[assignment]
    model = ModelConfig(hf_config=config, load_format="dummy", dtype="float32" if device == "cpu" else "bfloat16")
    rank = GpuRank(groups, model, engine, folder, device)
    wanted = rank.serve()
    rank.sampler.forced = rank.texts
    errors, placements = [furthest(rank.serve(), wanted)], []
    for seed in range(times):
        rank.watching = seed == times - 1
        errors += rebalance(rank, seed, lambda: furthest(rank.serve(), wanted))
        placements.append(rank.runner.moe.placement.phy2log_LP.tolist())
    rank.watching = False
    if sabotage is not None:
        if groups.rank == groups.dims.tp_size - 1:
            _sabotage(rank, sabotage)
        errors += rebalance(rank, times, lambda: furthest(rank.serve(), wanted))
        placements.append(rank.runner.moe.placement.phy2log_LP.tolist())
    rank.recorder.flush()
    counted = groups.rank != 0 or _cleanly_counted(folder)
    kept, right, stats = rank.addresses_kept(), rank.weights_right(), rank.manager.stats()
    rank.rename_two_experts()
    wrong = furthest(rank.serve(), wanted)
    rank.manager.close()
    graphs = rank.runner.graphs
    return Result(
        stats.rebalances_total, stats.aborted_total, placements, kept, right, graphs.sizes if graphs else (),
        rank.manager.direct, max(errors), wrong, rank.moving_steps, rank.waited, rank.watched, counted,
    )  # fmt: skip


def rebalance(rank: GpuRank, seed: int, serve: Callable[[], float]) -> list[float]:
    """Asks for a placement, and serves until all have it, and once more."""
    arch, found = rank.arch, []
    placement = random_placement(len(arch.moe_layers), arch.num_experts, arch.slots(rank.engine), seed)
    rank.manager.request(json.dumps({"physical_to_logical_map": placement.tolist()}))
    ended = rank.ended
    while not rank.manager.moving and rank.ended == ended:
        rank.turn()
    over = False
    while not over:
        over = rank.ended > ended
        found.append(serve())
    return found


def _cleanly_counted(folder: Path) -> bool:
    """In each window of the last placement, an expert's rows at the gate are the rows of the slots that hold it."""
    file = read_experts(folder / "experts.npz")
    assert file.slot_counts is not None
    last = np.flatnonzero(file.times[:, 0] >= file.placement_times[-1])
    experts = file.counts.shape[2]
    for window in last:
        for layer, placed in enumerate(file.placement[-1]):
            rows = np.bincount(placed, weights=file.slot_counts[window, layer], minlength=experts)
            if (rows != file.counts[window, layer]).any():
                return False
    return bool(file.counts[last].sum())
