"""One rank of the benchmark: loads the model, serves batches of equal requests through scheduler and pipeline, times.

The loop is the worker's without its messages: schedule, agree, launch, take the step before. Every step's time is kept,
with what it ran; ``report.py`` makes figures of them. Read next: ``toolkit/engine/pipeline.py``.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine import device as devices
from toolkit.engine.agree import Agreement, Proposal, agree
from toolkit.engine.arch import read_arch, wants_fp8
from toolkit.engine.bench.roofline import measure
from toolkit.engine.bench.streams import Attribution, Kernel, attributed
from toolkit.engine.core import SamplingParams
from toolkit.engine.dims import ParallelDims
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.prepare import prepare
from toolkit.engine.runner import ModelRunner

log = logging.getLogger(__name__)


class Job(msgspec.Struct, frozen=True):
    """What every rank is told.

    Attributes:
        batches: requests a DP rank, one point each.
        folder: where results go; each rank writes its own files.
        profile_steps: decode steps of each point that are profiled after it was timed; 0: none.
    """

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    device: str
    isl: int
    osl: int
    batches: list[int]
    folder: str
    host: str
    port: int
    profile_steps: int
    temperature: float = 0.0


class StepTime(msgspec.Struct, frozen=True, array_like=True):
    """One step: when its tokens were there, what it added to the time, tokens by kind on this DP rank."""

    seconds: float
    prefill: int
    decode: int
    any_prefill: bool


class Point(msgspec.Struct, frozen=True):
    """One batch size on one rank. ``profiled``: whose time the decode steps of its profile were; on a CPU, operators.

    ``profiled_wall_us``: a profiled step, from launch to launch.
    """

    batch: int
    steps: list[StepTime]
    profiled: Attribution
    profiled_wall_us: float


class RankResult(msgspec.Struct, frozen=True):
    """What one rank leaves in ``rank-<R>.json``."""

    rank: int
    device: str
    bytes_s: float
    flops_s: float
    memory: dict[str, int]
    graphs: list[int]
    kv_tokens: int
    dispatcher: str
    attention: str
    load_s: float
    points: list[Point]


@dataclass
class Loop:
    """Serves one batch of requests to its end, in step with the other ranks."""

    runner: ModelRunner
    groups: Groups
    job: Job
    steps: list[StepTime] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.extending: dict[int, bool] = {}

    def run(self, batch: int, osl: int, seed: int, on_decode: Callable[[int], bool] | None = None) -> list[StepTime]:
        """``batch`` requests of ``osl`` tokens. ``on_decode`` sees the count of pure decode steps; True: stop."""
        engine, dims = self.runner.engine, self.groups.dims
        scheduler = self.runner.new_scheduler()
        rng, vocab = random.Random(seed + dims.dp_rank(self.groups.rank)), self.runner.arch.vocab_size
        for i in range(batch):
            prompt = [rng.randrange(vocab) for _ in range(self.job.isl)]
            params = SamplingParams(max_tokens=osl, temperature=self.job.temperature, seed=i)
            refused = scheduler.add(f"{seed}-{i}", prompt, params)
            assert refused is None, f"{refused.error if refused else ''}: lower --isl and --osl, or raise the KV cache"
        self.steps, decodes = [], 0
        ahead = self.runner.device != "cpu" and not engine.disable_overlap_schedule
        pipeline = Pipeline(self.runner, scheduler, ahead, self._over)
        while True:
            pipeline.before_schedule()
            scheduled = scheduler.schedule()
            half = split(scheduled)[0].num_tokens if engine.enable_two_batch_overlap else -1
            tokens, rows = scheduled.num_tokens, scheduled.num_logit_rows
            mine = Proposal(tokens, rows, bool(scheduled.prefill), half, experts=self.experts())
            agreed = agree(self.groups.tp_cpu, dims, self.step, mine)
            self.between(agreed)
            ctx = agreed.ctx
            if not any(ctx.dp_tokens):
                pipeline.drain()
                if scheduler.idle:  # on every rank alike: all have as many requests, of the same lengths
                    return self.steps
                continue
            self.extending[ctx.step] = ctx.is_extend
            pipeline.launch(scheduled, ctx)
            self.launched()
            self.step += 1
            decodes += not ctx.is_extend
            if on_decode is not None and on_decode(decodes):
                pipeline.drain()
                return self.steps

    def experts(self) -> int:
        """What this rank says of experts that move."""
        return 0

    def between(self, agreed: Agreement) -> None:
        """Between two steps, on all ranks."""

    def launched(self) -> None:
        """After the launch of a step."""

    def _over(self, step: Step) -> None:
        prefill = sum(s.num_tokens for s in step.batch.prefill)
        extending = self.extending.pop(step.number)
        self.steps.append(StepTime(step.duration_s, prefill, len(step.batch.decode), extending))


def log_to(folder: Path, rank: int) -> None:
    """A log for each rank; what rank 0 says is shown, too."""
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank-{rank}.log")]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)


def run(job: Job, rank: int) -> None:
    """Everything of one rank; leaves ``rank-<R>.json``, rewritten after each batch size, and its log in the job's
    folder."""
    folder = Path(job.folder)
    log_to(folder, rank)
    begin = time.perf_counter()
    device = devices.use(job.device, rank)
    dims = ParallelDims.of(job.parallel)
    groups = Groups.connect(dims, rank, job.host, job.port, device)
    arch = read_arch(job.model)
    rates = measure(device, wants_fp8(arch, job.engine, device))
    runner = ModelRunner(job.model, arch, job.engine, groups, device)
    memory = prepare(runner, lambda stage, done, total: None)
    load_s = time.perf_counter() - begin
    log.info("rank %d is ready after %.1f s", rank, load_s)
    result = RankResult(
        rank, _name(device), rates.bytes_s, rates.flops_s, memory,
        list(runner.graphs.sizes) if runner.graphs else [], runner.engine.max_total_tokens,
        type(runner.moe.dispatcher).__name__, type(runner.attention).__name__, load_s, [],
    )  # fmt: skip
    for batch in job.batches:
        result.points.append(_point(runner, groups, job, batch, folder))
        (folder / f"rank-{rank}.json").write_bytes(msgspec.json.encode(result))


def _point(runner: ModelRunner, groups: Groups, job: Job, batch: int, folder: Path) -> Point:
    loop = Loop(runner, groups, job)
    warm = min(job.osl, 4)
    loop.run(batch, warm, seed=1)  # shapes compiled or chosen at first use
    steps = loop.run(batch, job.osl, seed=2)
    profiled, wall = _profile(loop, batch, job, folder)
    log.info("batch %d: %d steps", batch, len(steps))
    return Point(batch, steps, profiled, wall)


def _profile(loop: Loop, batch: int, job: Job, folder: Path) -> tuple[Attribution, float]:
    """Some decode steps at full batch, and the wall time of one."""
    lead = 2  # steps before the profile, so that it sees none of prefill
    times: list[float] = []
    count = min(job.profile_steps, job.osl - lead - 2)
    if count < 1:
        return Attribution([], 0.0), 0.0
    from torch.profiler import ProfilerActivity, profile

    gpu = loop.runner.device != "cpu"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    profiler: Any = profile(activities=activities)

    def on_decode(decodes: int) -> bool:
        if decodes == lead and not times:
            _wait(gpu)
            profiler.start()
            times.append(time.perf_counter())
        if decodes == lead + count:
            _wait(gpu)
            times.append(time.perf_counter())
            profiler.stop()
            return True
        return False

    loop.run(batch, job.osl, seed=3, on_decode=on_decode)
    if loop.groups.rank == 0:
        profiler.export_chrome_trace(str(folder / f"trace-batch-{batch}.json.gz"))
    profiled = kernels_of(profiler, count) if gpu else _operators(profiler, count)
    return profiled, (times[1] - times[0]) / count * 1e6


def kernels_of(profiler: Any, steps: int) -> Attribution:
    """What ran on the GPU, copies included; not the ranges that somebody named, which lie over it."""
    calls = [e for e in profiler.events() if str(e.device_type).endswith("CUDA") and not e.is_user_annotation]
    begins, ends = (np.array([getattr(e.time_range, side) for e in calls], np.float64) for side in ("start", "end"))
    return attributed([e.name for e in calls], [e.device_resource_id for e in calls], begins, ends, steps)


def _operators(profiler: Any, steps: int) -> Attribution:
    """On a CPU an operator calls others: its own time is without theirs."""
    totals = [
        Kernel(event.key, event.self_cpu_time_total / steps, event.count / steps, event.cpu_time_total / steps)
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0
    ]
    return Attribution(sorted(totals, key=lambda kernel: -kernel.us), sum(kernel.us for kernel in totals))


def _wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def _name(device: str) -> str:
    return "cpu" if device == "cpu" else str(torch.cuda.get_device_name(device))
