"""One rank on a GPU whose experts migrate while it serves: graphs, steps launched ahead, the worker's turn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.dist.migrating import Rank, _sabotage, random_placement
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.agree import Proposal, agree
from toolkit.engine.core import SamplingParams, TokenLogprobs
from toolkit.engine.eplb import transfers
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.prepare import prepare
from toolkit.records.experts import read_experts

REQUESTS, PROMPT, OUTPUT = 6, 40, 48
TIES = {False: 0.3, True: 0.6}  # in FP8: logprobs nearer than this are a tie, which another rounding may tip over

Text = list[int]


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
    compared: int  # tokens equal to those before experts moved
    tipped: int  # requests that went another way at a tie, and were not compared from there
    wrong: list[str]
    moving_steps: int
    cleanly_counted: bool


class GpuRank(Rank):
    """Warm, with graphs where the engine's options allow them."""

    def __init__(self, groups: Groups, model: ModelConfig, engine: EngineConfig, folder: Path, device: str) -> None:
        super().__init__(groups, model, engine, folder, device=device)
        recorder = self.runner.moe.recorder
        assert recorder is not None
        recorder.recording = False
        prepare(self.runner, lambda stage, done, total: None)
        recorder.start()
        self.maps = [t.data_ptr() for t in vars(self.runner.moe.placement._choice).values() if torch.is_tensor(t)]
        self.scheduler = self.runner.new_scheduler()
        self.pipeline = Pipeline(self.runner, self.scheduler, True, self._over)
        self.texts: dict[str, Text] = {}
        self.told: dict[str, list[TokenLogprobs]] = {}
        self.moving_steps = 0

    def turn(self, more: bool = True) -> bool:
        self.pipeline.before_schedule()
        batch = self.scheduler.schedule()
        mine = Proposal(
            batch.num_tokens, batch.num_logit_rows, bool(batch.prefill), -1, experts=self.manager.proposal
        )  # fmt: skip
        agreed = agree(self.groups.tp_cpu, self.groups.dims, self.steps, mine)
        self.manager.turn(agreed.experts, self.steps)
        recorder = self.runner.moe.recorder
        assert recorder is not None
        if any(agreed.ctx.dp_tokens):
            recorder.begin_pass(batch)
            self.pipeline.launch(batch, agreed.ctx)
            recorder.end_of_pass()
            self.steps += 1
            self.moving_steps += self.manager.moving
            return True
        self.pipeline.drain()
        if any(agreed.experts):
            self.manager.nap()
            return True
        return False

    def serve(self, logprobs: int | None = None) -> dict[str, Text]:
        """Greedy texts of this rank's requests, whatever experts do. Logprobs keep steps from running ahead."""
        self.texts = {}
        for i in range(REQUESTS):
            prompt = [(7 * i + 31 * self.groups.rank + 3 * j) % 500 for j in range(PROMPT + i)]
            assert self.scheduler.add(str(i), prompt, SamplingParams(max_tokens=OUTPUT, logprobs=logprobs)) is None
        while self.turn():
            pass
        self.scheduler.flush_cache()
        return self.texts

    def _over(self, step: Step) -> None:
        for output in step.outputs:
            self.texts.setdefault(output.rid, []).extend(output.token_ids)
            self.told.setdefault(output.rid, []).extend(output.logprobs)

    def addresses_kept(self) -> bool:
        maps = [t.data_ptr() for t in vars(self.runner.moe.placement._choice).values() if torch.is_tensor(t)]
        return super().addresses_kept() and maps == self.maps


def migrate_on_gpus(
    groups: Groups, config: dict[str, Any], engine: EngineConfig, folder: Path, times: int,
    sabotage: tuple[int, int] | None = None, direct: bool = True,
) -> Result:  # fmt: skip
    """Serves the same requests at rest, then while random placements come one after the other.

    Args:
        direct: False: as where GPUs cannot open each other's memory.
        sabotage: (rank, chunk): there, posting the transfers raises.
    """
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    if not direct:
        transfers._open_peers = lambda *_: {}  # type: ignore[assignment]
    model = ModelConfig(hf_config=config, load_format="dummy", dtype="float32" if device == "cpu" else "bfloat16")
    rank = GpuRank(groups, model, engine, folder, device)
    before = rank.serve(logprobs=8)
    told = {rid: list(entries) for rid, entries in rank.told.items()}
    if sabotage is not None and sabotage[0] == groups.rank:
        _sabotage(rank, sabotage[1])
    compared, tipped, wrong, placements = 0, 0, [], []
    arch = rank.arch
    for seed in range(times):
        placement = random_placement(len(arch.moe_layers), arch.num_experts, arch.slots(engine), seed)
        rank.manager.request(json.dumps({"physical_to_logical_map": placement.tolist()}))
        ended = rank.ended
        while not rank.manager.moving and rank.ended == ended:
            rank.turn()
        while True:
            over = rank.ended > ended
            for rid, text in rank.serve().items():
                same, tie, why = _compare(before[rid], told[rid], text, TIES[rank.runner.moe.shape.fp8])
                compared, tipped = compared + same, tipped + tie
                wrong += [f"placement {seed}, request {rid}: {why}"] if why else []
            if over:  # once more in the new placement
                break
        placements.append(rank.runner.moe.placement.phy2log_LP.tolist())
    recorder = rank.runner.moe.recorder
    assert recorder is not None
    recorder.flush()
    stats = rank.manager.stats()
    rank.manager.close()
    graphs = rank.runner.graphs
    return Result(
        stats.rebalances_total, stats.aborted_total, placements, rank.addresses_kept(), rank.weights_right(),
        graphs.sizes if graphs else (), rank.manager.direct, compared, tipped, wrong, rank.moving_steps,
        groups.rank != 0 or _cleanly_counted(folder),
    )  # fmt: skip


def _compare(wanted: Text, logprobs: list[TokenLogprobs], found: Text, tie: float) -> tuple[int, int, str]:
    """Tokens that are equal; 1 if the first other one was as good as the best; else what is wrong."""
    assert len(wanted) == len(found) == OUTPUT, (len(wanted), len(found))
    for position, (a, b, told) in enumerate(zip(wanted, found, logprobs)):
        if a != b:
            below = dict(zip(told.top_ids, told.top_logprobs)).get(b, -np.inf)
            gap = told.top_logprobs[0] - below
            return position, int(gap < tie), "" if gap < tie else f"token {position}: {a} became {b}, {gap:.3f} below"
    return OUTPUT, 0, ""


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
