"""Scheduler time a step against the number of waiting requests: it must not grow.

    python -m tests.bench.scheduler

A full running batch decodes while 10, 1,000 and 10,000 requests wait; ``schedule`` and ``finish`` are timed without
any model. The rounds of the three are interleaved, so that a noisy machine disturbs them alike. Prints the median and
spread of each and the ratio to the first.
"""

from __future__ import annotations

import statistics
import sys
import time

from toolkit.config.engine import EngineConfig
from toolkit.engine.core import SamplingParams
from toolkit.engine.kv.kinds import layer_kinds
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.scheduler import Scheduler

WAITING = (10, 1_000, 10_000)
RUNNING, PROMPT, STEPS, ROUNDS = 64, 64, 50, 40


def full(waiting: int) -> Scheduler:
    """A scheduler whose running batch is full and decodes, with ``waiting`` requests behind it."""
    engine = EngineConfig(max_total_tokens=RUNNING * 8192, page_size=16)
    tables = BlockTables(layer_kinds((0,), engine), engine.page_size, prefix_cache=True)
    scheduler = Scheduler(tables, RUNNING * PROMPT, RUNNING, max_len=8192)
    for i in range(RUNNING + waiting):
        scheduler.add(f"r{i}", [i % 997] * PROMPT, SamplingParams(max_tokens=1 << 20))
    while True:
        batch = scheduler.schedule()
        scheduler.finish(batch, [1] * batch.num_logit_rows)
        if len(batch.decode) == RUNNING:
            return scheduler


def steps(scheduler: Scheduler) -> float:
    """Microseconds a step."""
    begin = time.perf_counter()
    for _ in range(STEPS):
        batch = scheduler.schedule()
        scheduler.finish(batch, [1] * batch.num_logit_rows)
    return (time.perf_counter() - begin) / STEPS * 1e6


def main() -> None:
    schedulers = {waiting: full(waiting) for waiting in WAITING}
    times: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
    for _ in range(ROUNDS):
        for waiting, scheduler in schedulers.items():
            times[waiting].append(steps(scheduler))
    base = statistics.median(times[WAITING[0]])
    print(f"{RUNNING} running requests, {ROUNDS} rounds of {STEPS} steps")
    for waiting, values in times.items():
        low, median, high = min(values), statistics.median(values), max(values)
        print(f"{waiting:>7,} waiting: {median:7.1f} us a step ({low:.1f} to {high:.1f}), {median / base:.2f} x")


if __name__ == "__main__":
    sys.exit(main())
