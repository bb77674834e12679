"""What a rebalance costs the steps of a serving engine: step times while experts move, the pause of each chunk.

    python -m toolkit.engine.bench.migration --model qwen3_30b_a3b --parallel dep2 --batch 128 --osl 400 \\
        --set engine.moe_a2a_backend=deepep engine.ep_num_redundant_experts=16

Serves one batch as ``python -m toolkit.engine.bench`` does (same options), first with experts at rest, then while one
placement after the other is asked for, each with another share of the slots exchanged between ranks. Leaves a folder
with ``migration.md`` (the table), ``rank-<R>.json`` (every step) and ``rebalances.jsonl``. Read next: ``rank.py``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.engine import device as devices
from toolkit.engine.agree import Agreement, Proposal, agree
from toolkit.engine.arch import read_arch
from toolkit.engine.bench.__main__ import arguments, bench
from toolkit.engine.bench.rank import Job, Loop, log_to
from toolkit.engine.dims import ParallelDims
from toolkit.engine.eplb.manager import Manager
from toolkit.engine.eplb.setup import make_manager, make_recorder
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Step
from toolkit.engine.prepare import prepare
from toolkit.engine.runner import ModelRunner
from toolkit.records.experts import RebalanceRecord, read_rebalances

Ints = NDArray[np.int64]
State = Literal["rest", "moving", "paused"]
EPLB = [
    "engine.enable_eplb=true", "engine.expert_distribution_recorder_mode=stat",
    "engine.eplb_rebalance_num_iterations=1000000000",
]  # fmt: skip
SHARES = (0.05, 0.25, 1.0)
LEAD = 16  # decode steps before the first rebalance
TIMES = 3  # rebalances of a share


class Steps(msgspec.Struct, frozen=True):
    """Times of full decode steps on one rank, by what experts did when they were launched, in seconds."""

    share: float
    rebalances: int
    rest: list[float]
    moving: list[float]
    paused: list[float]


class RankResult(msgspec.Struct, frozen=True):
    """What one rank leaves in ``rank-<R>.json``."""

    device: str
    direct: bool
    points: list[Steps]


@dataclass
class MovingLoop(Loop):
    """The benchmark's loop, with experts that move. ``share``: of slots that each placement exchanges; 0: none."""

    manager: Manager = field(kw_only=True)
    share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.states: dict[int, State] = {}
        self.times: dict[State, list[float]] = {"rest": [], "moving": [], "paused": []}
        self.asked = self.first = self.ended
        self.decodes = 0
        self.full = 0

    @property
    def ended(self) -> int:
        stats = self.manager.stats()
        return stats.rebalances_total + stats.aborted_total

    def experts(self) -> int:
        return self.manager.proposal

    def between(self, agreed: Agreement) -> None:
        before = self.manager.pause_s
        self.manager.turn(agreed.experts, self.step)
        paused = self.manager.pause_s > before
        self.states[self.step] = "paused" if paused else "moving" if self.manager.moving else "rest"
        self.decodes += not agreed.ctx.is_extend
        due = self.share > 0 and self.decodes > LEAD and self.asked < self.first + TIMES
        if due and self.asked == self.ended and not self.manager.moving:
            self.ask()

    def ask(self) -> None:
        """The next placement; the same on all ranks."""
        placement = self.runner.moe.placement
        wanted = exchanged(placement.phy2log_LP, placement.ep_size, self.share, self.asked)
        self.asked += 1
        self.manager.request(json.dumps({"physical_to_logical_map": wanted.tolist()}))

    def launched(self) -> None:
        recorder = self.runner.moe.recorder
        assert recorder is not None
        recorder.end_of_pass()

    def _over(self, step: Step) -> None:
        extending = self.extending[step.number]
        super()._over(step)
        state = self.states.pop(step.number)
        if not extending and len(step.batch.decode) == self.full:
            self.times[state].append(step.duration_s)

    def rest(self) -> None:
        """Turns without tokens until no expert moves."""
        while True:
            agreed = agree(
                self.groups.tp_cpu, self.groups.dims, self.step, Proposal(0, 0, False, -1, experts=self.experts())
            )
            self.manager.turn(agreed.experts, self.step)
            if self.ended == self.asked and not self.manager.moving:
                return
            self.manager.nap()


def exchanged(phy2log_LP: Ints, ranks: int, share: float, seed: int) -> Ints:
    """The placement after ``share`` of each layer's slots changed places, in pairs of different ranks' experts."""
    rng, new = np.random.default_rng(seed), phy2log_LP.copy()
    slots, local = phy2log_LP.shape[1], phy2log_LP.shape[1] // ranks
    for row in new:
        first, second = rng.permutation(slots)[: slots // 2 * 2].reshape(2, -1)
        across = np.flatnonzero((first // local != second // local) & (row[first] != row[second]))
        pairs = across[: max(1, round(share * slots / 2))]
        row[first[pairs]], row[second[pairs]] = row[second[pairs]], row[first[pairs]]
    return new


def run(job: Job, rank: int) -> None:
    """Everything of one rank."""
    folder = Path(job.folder)
    log_to(folder, rank)
    device = devices.use(job.device, rank)
    groups = Groups.connect(ParallelDims.of(job.parallel), rank, job.host, job.port, device)
    arch = read_arch(job.model)
    runner = ModelRunner(job.model, arch, job.engine, groups, device)
    recorder = make_recorder(arch, runner.moe, "", device)
    assert recorder is not None
    runner.moe.recorder, recorder.recording = recorder, False
    manager = make_manager(arch, runner.moe, recorder, folder)
    assert manager is not None
    prepare(runner, lambda stage, done, total: None)
    recorder.start()
    points = []
    with torch.inference_mode():
        warm = MovingLoop(runner, groups, job, manager=manager)
        warm.run(job.batches[0], min(job.osl, 4), seed=1)
        warm.ask()  # the planning process compiles
        warm.rest()
        for share in (0.0, *SHARES):
            loop = MovingLoop(runner, groups, job, step=warm.step, manager=manager, share=share)
            loop.full = job.batches[0]
            loop.run(loop.full, job.osl, seed=2)
            loop.rest()
            warm.step = loop.step
            points.append(Steps(share, loop.ended - loop.first, *loop.times.values()))
    manager.close()
    result = RankResult(device, manager.direct, points)
    (folder / f"rank-{rank}.json").write_bytes(msgspec.json.encode(result))


def table(results: Sequence[RankResult], records: Sequence[RebalanceRecord]) -> str:
    """Steps by state, of all ranks together, and the chunks of each rebalance, as the first rank saw them."""
    lines = [
        "| slots exchanged | step ms at rest | while experts move | with a start or commit | longest |",
        "|---|---|---|---|---|",
    ]
    for points in zip(*(r.points for r in results)):
        states = [p.rest for p in points], [p.moving for p in points], [p.paused for p in points]
        cells = [_times([t for one in times for t in one], len(points)) for times in states]
        longest = 1e3 * max((t for times in states for one in times for t in one), default=0.0)
        lines.append(f"| {points[0].share:.0%} | {' | '.join(cells)} | {longest:.2f} |")
    lines += [
        "",
        "| slots exchanged | rebalances | slots, chunks | MB a chunk | link ms | GB/s | pause ms | longest | all, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    left = list(records[1:])  # after the one that warmed up
    for point in results[0].points:
        mine, left = left[: point.rebalances], left[point.rebalances :]
        if mine:
            lines.append(f"| {point.share:.0%} | {_chunks(mine)} |")
    return "\n".join(lines)


def _chunks(records: Sequence[RebalanceRecord]) -> str:
    """Cells: medians over chunks, and the rate over all; the link is the GPU's own clock, 0 on CPUs."""
    sent, link = [b for r in records for b in r.sent_bytes], [ms for r in records for ms in r.link_ms]
    pauses = [ms for r in records for ms in r.pauses_ms]
    cells = [
        f"{sum(r.state == 'done' for r in records)} of {len(records)} done",
        f"{records[0].moved_slots}, {records[0].chunks}",
        f"{statistics.median(sent) / 1e6 if sent else 0:.1f}",
        f"{statistics.median(link) if link else 0:.3f}",
        f"{sum(sent) / sum(link) / 1e6:.0f}" if sum(link) else "-",
        f"{statistics.median(pauses):.3f}",
        f"{max(pauses):.3f}",
        f"{1e3 * statistics.median(r.t_end - r.t_begin for r in records):.0f}",
    ]
    return " | ".join(cells)


def _times(seconds: list[float], ranks: int) -> str:
    """Median, p90 and how many steps."""
    if not seconds:
        return "-"
    every = sorted(1e3 * t for t in seconds)
    return f"{statistics.median(every):.2f} (p90 {every[int(0.9 * len(every))]:.2f}, {len(every) // ranks} steps)"


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(sys.argv[1:] if argv is None else argv, "python -m toolkit.engine.bench.migration", __doc__ or "")
    args.set = [*EPLB, *args.set]
    return bench(args, run, _report, "-migration")


def _report(job: Job, folder: Path) -> None:
    ranks = range(job.parallel.tp_size)
    results = [msgspec.json.decode((folder / f"rank-{r}.json").read_bytes(), type=RankResult) for r in ranks]
    way = "straight into the peer's memory" if results[0].direct else "by NCCL, or gloo on CPUs"
    report = f"{results[0].device}, experts move {way}\n\n{table(results, read_rebalances(folder))}\n"
    (folder / "migration.md").write_text(report)
    sys.stdout.write(f"{report}\n{folder}\n")


if __name__ == "__main__":
    sys.exit(main())
