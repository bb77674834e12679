"""The processes that send: how many, on which cores, what each gets to do, and their rows together again.

Knows no HTTP and takes no stamps (``worker.py``). Each process gets its share of a point's slots and calls before the
point begins; while it runs, nothing is asked of this process but to pass on how far it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import msgspec

from toolkit.loadgen.exchange import Call
from toolkit.loadgen.proof import Evidence
from toolkit.loadgen.rows import tables
from toolkit.loadgen.wire import RAW_SUFFIX, Broken, Done, Go, Point, Progress, Ready, Report, Setup, Stop
from toolkit.records.requests import requests_schema

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

SLOTS_A_WORKER = 16  # fewer do not earn a process of their own
STOP_S = 15.0  # for the processes to write down what there is
LINE_BYTES = 1 << 20


class WorkerError(Exception):
    """A process of the load generator failed or ended by itself."""


@dataclass(frozen=True)
class Load:
    """A load point for all processes together. ``slots``: closed loop, or cap of an open one (0: none)."""

    index: int
    concurrency: int
    slots: int
    open_loop: bool
    ramp_s: float


@dataclass(frozen=True)
class Result:
    """A load point's rows, its raw answers where they are kept, what each process saw of itself."""

    table: pa.Table
    raw: pa.Table | None
    evidence: list[Evidence]
    interrupted: bool


def share_of_cores(cores: int, most_in_flight: int) -> int:
    """Processes of a node: one for each allowed core but one, where there is work for so many."""
    return max(1, min(cores - 1, -(-most_in_flight // SLOTS_A_WORKER)))


def pinned(setup: Setup, count: int, pin: bool) -> list[Setup]:
    """A setup for each process; pinned ones stay on the last of the allowed cores, the first is left to others."""
    cores = allowed_cores()
    if not pin or count >= len(cores):
        return [setup] * count
    return [msgspec.structs.replace(setup, cpu=core) for core in cores[-count:]]


def allowed_cores() -> list[int]:
    """Cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


class CallsFile:
    """Writes one process's calls and their bodies to files, so that none of them fills memory."""

    def __init__(self, folder: Path, name: str) -> None:
        self.calls_path, self.bodies_path = folder / f"{name}.calls", folder / f"{name}.bodies"
        self.rows_path = folder / f"{name}.rows"
        self.raw_path = folder / f"{name}.rows{RAW_SUFFIX}"
        self._calls: list[Call] = []
        self._bodies: BinaryIO = self.bodies_path.open("wb")
        self._end = 0

    def add(self, call: Call, body: bytes) -> None:
        self._bodies.write(body)
        self._calls.append(msgspec.structs.replace(call, offset=self._end, length=len(body)))
        self._end += len(body)

    def __len__(self) -> int:
        return len(self._calls)

    def remove(self) -> None:
        for path in (self.calls_path, self.bodies_path, self.rows_path, self.raw_path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._bodies.close()
        self.calls_path.write_bytes(msgspec.msgpack.encode(self._calls))


class Member(Protocol):
    """A worker process: ``LocalWorker`` on this node, ``groups.RemoteWorker`` on another.

    Attributes:
        progress: the last that it said of the running point.
        clock_offset_s: its clock minus this node's.
    """

    progress: Progress

    @property
    def clock_offset_s(self) -> float: ...

    async def begin(self, point: Point) -> None:
        """Gives it its share of a point. Raises ``WorkerError``."""
        ...

    def tell(self, command: Go | Stop) -> None: ...

    async def hear(self, wanted: type[Ready] | type[Done]) -> Ready | Done:
        """The next report of a kind; progress on the way is kept. Raises ``WorkerError`` when the process is gone."""
        ...

    async def close(self) -> None: ...


class LocalWorker:
    """A worker process of this node, spoken to through pipes."""

    clock_offset_s = 0.0

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._input, self._output = process.stdin, process.stdout
        self._decoder = msgspec.json.Decoder(Report)
        self.progress = Progress(0, 0, 0, 0)

    @classmethod
    async def start(cls, setup: Setup) -> LocalWorker:
        words = [sys.executable, "-m", "toolkit.loadgen.process", msgspec.json.encode(setup).decode()]
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, limit=LINE_BYTES))

    async def begin(self, point: Point) -> None:
        self.tell(point)

    def tell(self, command: Point | Go | Stop) -> None:
        with contextlib.suppress(ConnectionError):
            self._input.write(msgspec.json.encode(command) + b"\n")

    async def reports(self) -> AsyncIterator[Report]:
        """What it says, until it ends."""
        while line := await self._output.readline():
            yield self._decoder.decode(line)

    async def hear(self, wanted: type[Ready] | type[Done]) -> Ready | Done:
        async for report in self.reports():
            if isinstance(report, Progress):
                self.progress = report
            elif isinstance(report, Broken):
                raise WorkerError(f"a process of the load generator failed: {report.reason}")
            elif isinstance(report, wanted):
                return report
        raise WorkerError(f"a process of the load generator ended with exit code {await self.ended()}")

    async def ended(self) -> int:
        """Its exit code."""
        return await self._process.wait()

    async def close(self) -> None:
        self._input.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._process.kill()


class Pool:
    """Worker processes for a run. ``async with`` it; ``run`` once a load point.

    Args:
        setups: one a process of this node.
        folder: for the files that pass to and from the processes.
        others: processes of other nodes; whoever brings them ends them.
    """

    def __init__(self, setups: Sequence[Setup], folder: Path, others: Sequence[Member] = ()) -> None:
        self._setups = setups
        self._folder = folder
        self._others = others
        self._members: list[Member] = []

    async def __aenter__(self) -> Pool:
        for setup in self._setups:
            self._members.append(await LocalWorker.start(setup))
        self._members += self._others
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(member.close() for member in self._members))

    def files(self, load: Load) -> list[CallsFile]:
        """A file for each process that takes part in the point. Give conversation i to ``files[owner(i)]``."""
        count = min(len(self._members), load.slots or len(self._members))
        return [CallsFile(self._folder, f"{load.index}-{number}") for number in range(count)]

    async def run(
        self, load: Load, files: Sequence[CallsFile], progress: Callable[[Progress], None], interval_s: float
    ) -> Result:
        """Runs the point.

        Cancelling it stops the point early: calls in flight end as cancelled, and the rows so far are returned as an
        interrupted result. Raises ``WorkerError``.
        """
        members = self._members[: len(files)]
        for one, file in zip(members, files, strict=True):
            file.close()
            one.progress = Progress(0, 0, 0, 0)
        shares = [_share(load, file, number, len(files)) for number, file in enumerate(files)]
        preparing = asyncio.gather(*(_prepare(*pair) for pair in zip(members, shares, strict=True)))
        interrupted = False
        while not preparing.done():
            try:
                await asyncio.wait([preparing])
            except asyncio.CancelledError:
                interrupted = True
        preparing.result()
        for one in members:
            one.tell(Stop() if interrupted else Go())
        waiting = asyncio.gather(*(one.hear(Done) for one in members))
        while not waiting.done():
            try:
                await asyncio.wait([waiting], timeout=interval_s)
            except asyncio.CancelledError:
                interrupted = True
                for one in members:
                    one.tell(Stop())
            progress(_total([one.progress for one in members]))
        done = [report for report in waiting.result() if isinstance(report, Done)]
        offsets = [one.clock_offset_s for one in members]
        evidence = [_evidence(*pair) for pair in zip(done, offsets, strict=True)]
        rows = tables([f.rows_path for f in files], offsets, "t_send", 1.0)
        raw = tables([f.raw_path for f in files], offsets, "read_ns", 1e9)
        for file in files:
            file.remove()
        return Result(rows or requests_schema().empty_table(), raw, evidence, interrupted)


async def _prepare(member: Member, point: Point) -> None:
    await member.begin(point)
    await member.hear(Ready)


def _evidence(done: Done, offset_s: float) -> Evidence:
    done.evidence.clock_offset_ms = abs(offset_s) * 1e3
    return done.evidence


def owner(conversation: int, load: Load, workers: int) -> int:
    """Which process gets a conversation: slots go round over the processes, and conversations over the slots."""
    return (conversation % load.slots if load.slots else conversation) % workers


def _share(load: Load, file: CallsFile, number: int, workers: int) -> Point:
    return Point(
        index=load.index,
        concurrency=load.concurrency,
        slots=load.slots // workers + (number < load.slots % workers),
        open_loop=load.open_loop,
        calls=str(file.calls_path),
        bodies=str(file.bodies_path),
        rows=str(file.rows_path),
        offset=number,
        stride=workers,
        ramp_s=load.ramp_s,
    )


def _total(parts: Sequence[Progress]) -> Progress:
    return Progress(
        done=sum(part.done for part in parts),
        failed=sum(part.failed for part in parts),
        cancelled=sum(part.cancelled for part in parts),
        reads=sum(part.reads for part in parts),
        parsing=any(part.parsing for part in parts),
    )
