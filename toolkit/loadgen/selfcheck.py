"""``python -m toolkit.loadgen selfcheck``: what this machine's load generator can bear, and how far off it is.

Loads the exact-schedule server with the same processes, transport and figures as a real run and compares percentiles
with the server's own log: the difference is the client's error. Both share this machine, so that a small one shows
less than the client could do elsewhere; ``server late`` says how late the server itself was.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from toolkit.loadgen import exact
from toolkit.loadgen.exchange import Call
from toolkit.loadgen.pool import Load, Pool, owner, pinned
from toolkit.loadgen.proof import judge
from toolkit.loadgen.wire import Progress, Setup
from toolkit.records.status import ClientProof

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


LATE_MS = 2.0  # of the bundled server: from here on the machine is worth a word


@dataclass(frozen=True)
class Case:
    """``streams`` at a time a process, each request ``tokens`` long, ``rounds`` of them after one that warms up."""

    streams: int
    schedule: exact.Schedule
    tokens: int
    rounds: int = 2

    def name(self, workers: int = 1) -> str:
        """With the streams of all processes."""
        grid = self.schedule.grid_ms
        return f"{self.streams * workers} x {self.schedule.itl_ms:g} ms" + (", one grid" if grid else "")


@dataclass(frozen=True)
class Outcome:
    """A case's result. Errors are reported minus true percentiles, ms."""

    case: Case
    transport: str
    requests: int
    failed: int
    tok_s: float
    ttft_p50_error_ms: float
    ttft_p99_error_ms: float
    itl_p99_error_ms: float
    e2e_p99_error_ms: float
    server_late_ms: float  # p99 of how late the server sent: its gaps beyond the schedule's
    proof: ClientProof


QUICK = (
    Case(16, exact.Schedule(itl_ms=10), 100),
    Case(128, exact.Schedule(itl_ms=10), 100),
    Case(512, exact.Schedule(itl_ms=10), 250),
    Case(1024, exact.Schedule(itl_ms=10), 250),
    Case(512, exact.Schedule(itl_ms=25, grid_ms=25), 60),
)


async def run_case(case: Case, transport: str, workers: int = 1, pin: bool = True, compiled: bool = True) -> Outcome:
    """Runs one case; each process loads a server of its own, so that no server is what limits them.

    Each server has a core to itself when ``pin`` and there are enough.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = pin and len(cores) >= 2 * workers
    with tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(exact.running(case.schedule, compiled, core if own else -1))
                for _, core in zip(range(workers), itertools.cycle(cores))
            ]
            kind: Literal["socket", "aiohttp"] = "socket" if transport == "socket" else "aiohttp"
            setups = [Setup(f"{server.url}/v1/chat/completions", kind, 120.0) for server in servers]
            async with Pool([pinned(one, workers, own)[i] for i, one in enumerate(setups)], Path(folder)) as pool:
                table, proof = await _load(pool, case, transport, workers)
        truths = [server.truth.after(case.streams) for server in servers]
    truth = exact.Truth(np.concatenate([one.arrived for one in truths]), [sent for one in truths for sent in one.sent])
    return _compare(case, transport, table, truth, proof)


async def _load(pool: Pool, case: Case, transport: str, workers: int) -> tuple[pa.Table, ClientProof]:
    streams = case.streams * workers
    load = Load(0, streams, streams, open_loop=False, ramp_s=0.0)
    files = pool.files(load)
    body = msgspec.json.encode(
        {"model": "exact", "messages": [{"role": "user", "content": "word " * 100}], "max_tokens": case.tokens}
    )
    for number in range(streams * (case.rounds + 1)):
        call = Call(f"check-{number}", "check", number < streams, case.tokens, 0, 0)
        files[owner(number, load, len(files))].add(call, body)
    result = await pool.run(load, files, _quiet, 0.25)
    return result.table, judge(result.evidence, transport, len(files))


def _quiet(progress: Progress) -> None:
    """A case is too short to show progress."""


def _compare(case: Case, transport: str, table: pa.Table, truth: exact.Truth, proof: ClientProof) -> Outcome:
    from toolkit.analysis.metrics import e2e_s, interval, itl_s, succeeded, ttft_s

    frame: pd.DataFrame = table.to_pandas()
    ok = succeeded(frame)
    begin, end = interval(frame)

    def error_ms(ours: np.ndarray, true: np.ndarray, percent: float) -> float:
        return float(np.percentile(ours, percent) - np.percentile(true, percent)) * 1e3

    late = truth.itl_s - max(case.schedule.itl_ms, case.schedule.grid_ms) * 1e-3
    return Outcome(
        case=case,
        transport=transport,
        requests=len(frame),
        failed=int((frame["status"] != "ok").sum()),
        tok_s=float(ok["output_tokens"].sum()) / (end - begin),
        ttft_p50_error_ms=error_ms(ttft_s(ok), truth.ttft_s, 50),
        ttft_p99_error_ms=error_ms(ttft_s(ok), truth.ttft_s, 99),
        itl_p99_error_ms=error_ms(itl_s(ok), truth.itl_s, 99),
        e2e_p99_error_ms=error_ms(e2e_s(ok), truth.e2e_s, 99),
        server_late_ms=float(np.percentile(late, 99)) * 1e3,
        proof=proof,
    )


def render(outcomes: Sequence[Outcome], title: str) -> str:
    """A table, a line a case, and why a verdict is not ok."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = (
        "case", "transport", "work-\ners", "failed", "tok/s", "TTFT p99\nerror ms", "ITL p99\nerror ms",
        "E2E p99\nerror ms", "held", "CPU ms /\n1k tok", "RSS\nMB", "lag p99\nms", "coal-\nesced", "server\nlate ms",
        "verdict",
    )  # fmt: skip
    for name in columns:
        texts = name in ("case", "transport", "verdict")
        table.add_column(name, justify="left" if texts else "right", no_wrap=texts)
    for one in outcomes:
        proof = one.proof
        table.add_row(
            one.case.name(proof.workers), one.transport, str(proof.workers), str(one.failed), f"{one.tok_s:,.0f}",
            f"{one.ttft_p99_error_ms:+.2f}", f"{one.itl_p99_error_ms:+.2f}", f"{one.e2e_p99_error_ms:+.2f}",
            f"{proof.held:.1%}", f"{proof.cpu_ms_per_1000_tokens:.1f}", f"{proof.peak_rss_mb:.0f}",
            f"{proof.lag_p99_ms:.2f}", f"{proof.coalesced:.2%}", f"{one.server_late_ms:.2f}", proof.verdict,
        )  # fmt: skip
    text = io.StringIO()
    console = Console(file=text, width=200)
    console.print(table)
    for one in outcomes:
        if one.proof.reasons:
            late = "; the bundled server was late itself: this machine is busy" if one.server_late_ms > LATE_MS else ""
            why = f"{one.proof.verdict}: {'; '.join(one.proof.reasons)}{late}"
            console.print(f"{one.case.name(one.proof.workers)}: {why}", markup=False, soft_wrap=True)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def sound(outcome: Outcome) -> bool:
    """Whether the client had no part in the case's figures."""
    return outcome.proof.verdict == "ok" and not outcome.failed


def ceiling(outcomes: Sequence[Outcome]) -> str:
    """What the cases say, in a sentence."""
    good = list(filter(sound, outcomes))
    if not good:
        return "No case was free of the client's own delays: this machine is too slow or too busy to measure from."
    best = max(good, key=lambda one: one.tok_s)
    error_ms = max(abs(best.ttft_p99_error_ms), abs(best.itl_p99_error_ms))
    workers = best.proof.workers
    return (
        f"This machine bears at least {best.tok_s:,.0f} tok/s over {best.case.streams * workers} streams with "
        f"{workers} process(es), its percentiles off by {error_ms:.2f} ms. Plan for less than 60 % of it."
    )


USAGE = """\
Measures this machine before a server is measured from it: a bundled server answers on an exact schedule and logs when
it really sent each token; the load generator's percentiles are compared with that log. Takes under a minute.

  python -m toolkit.loadgen selfcheck [transport=socket|aiohttp] [workers=N]

  transport=socket   stamped by the kernel; aiohttp: what TLS and proxies get
  workers=1          processes that send, each against a server of its own: give it two cores for each

Columns: errors are reported minus true percentiles; held: requests in flight of those asked for; CPU: of the load
generator for a thousand tokens, reading the answers included; lag: how long the kernel had bytes before the process
took them (moves no figure); coalesced: tokens that came in one read with others; server late: how late the bundled
server itself was, which is this machine's doing, not the load generator's; verdict: as in status.json of a real run.
Exit status: 0 there is a case that this machine can bear, 1 there is none, 2 an option is wrong."""


def main(words: Sequence[str]) -> int:
    """The words after ``selfcheck``: the quick cases, a table, and what they say. Returns the exit status."""
    if {"-h", "--help", "help"} & set(words):
        sys.stdout.write(USAGE + "\n")
        return 0
    values = dict(word.partition("=")[::2] for word in words)
    transport, workers = values.pop("transport", "socket"), values.pop("workers", "1")
    if values or transport not in ("socket", "aiohttp") or not workers.isdigit() or not int(workers):
        sys.stderr.write("selfcheck takes transport=socket or aiohttp, and workers=N of at least 1\n")
        return 2
    outcomes = []
    for case in QUICK:
        sys.stderr.write(f"{case.name(int(workers))} ...\n")
        outcomes.append(asyncio.run(run_case(case, transport, int(workers))))
    sys.stdout.write(render(outcomes, "this machine's load generator against an exact-schedule server"))
    sys.stdout.write(ceiling(outcomes) + "\n")
    return 0 if any(map(sound, outcomes)) else 1
