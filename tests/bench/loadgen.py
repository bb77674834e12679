"""``make bench-loadgen``: the load generator's error against a server whose true send times are known, in a table.

    python -m tests.bench.loadgen [socket] [aiohttp] [rounds=N] [out=FILE]

``rounds``: how often each case runs, a row each; ``out``: the rows as JSON, too, and the table beside it as text.
Over sockets alone it takes a minute and a half.

Every case runs with one process on one core, and one with two processes as well where there are four cores: each
process loads a server of its own, on a core of its own. On a shared machine run it when it is calm: ``server late`` and
``lag p99`` show when it was not.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from toolkit.loadgen.exact import Schedule
from toolkit.loadgen.selfcheck import Case, Outcome, render, run_case

CASES = (
    Case(16, Schedule(itl_ms=10), 250),
    Case(512, Schedule(itl_ms=10), 250),
    Case(1024, Schedule(itl_ms=10), 250),
    Case(2048, Schedule(itl_ms=40), 100),
    Case(512, Schedule(itl_ms=25, grid_ms=25), 100),
)
BUSY = Case(2048, Schedule(itl_ms=10), 250)  # all that a process can do
GOALS = """goals, one core: TTFT p99 and ITL p99 error <= 1 ms, E2E p99 error <= 2 ms, held >= 98 %,
CPU <= 15 ms / 1k tokens, RSS <= 300 MB; two cores >= 1.8 x the tok/s of one (last two rows)"""


def main(words: list[str]) -> None:
    out = next((Path(word.removeprefix("out=")) for word in words if word.startswith("out=")), None)
    transports = [word for word in words if word in ("socket", "aiohttp")] or ["socket", "aiohttp"]
    rounds = next((int(word.removeprefix("rounds=")) for word in words if word.startswith("rounds=")), 1)
    outcomes: list[Outcome] = []
    for transport in transports:
        for case in CASES:
            for _ in range(rounds):
                print(f"{transport}: {case.name()} ...", file=sys.stderr)
                outcomes.append(asyncio.run(run_case(case, transport)))
    if len(os.sched_getaffinity(0)) >= 4:
        outcomes += [asyncio.run(run_case(BUSY, "socket", workers)) for workers in (1, 2)]
    table = f"{render(outcomes, 'reported minus true percentiles')}\n{GOALS}\n"
    print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes)) + b"\n")
        out.with_suffix(".txt").write_text(table)


if __name__ == "__main__":
    main(sys.argv[1:])
