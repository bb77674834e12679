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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from toolkit.loadgen.exchange import Call
from toolkit.loadgen.proof import Evidence
from toolkit.loadgen.wire import RAW_SUFFIX, Broken, Done, Go, Point, Progress, Ready, Report, Setup, Stop
from toolkit.records import requests_schema

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


def auto_workers(most_in_flight: int) -> int:
    """One process for each allowed core but one, where there is work for so many."""
    return max(1, min(len(_cores()) - 1, -(-most_in_flight // SLOTS_A_WORKER)))


def pinned(setup: Setup, count: int, pin: bool) -> list[Setup]:
    """A setup for each process; pinned ones stay on the last of the allowed cores, the first is left to others."""
    cores = _cores()
    if not pin or count >= len(cores):
        return [setup] * count
    return [msgspec.structs.replace(setup, cpu=core) for core in cores[-count:]]


def _cores() -> list[int]:
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


class _Process:
    """One worker process and the last thing it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process = process
        self._input, self._output = process.stdin, process.stdout
        self._decoder = msgspec.json.Decoder(Report)
        self.progress = Progress(0, 0, 0)

    def tell(self, command: Point | Go | Stop) -> None:
        with contextlib.suppress(ConnectionError):
            self._input.write(msgspec.json.encode(command) + b"\n")

    async def hear(self, wanted: type[Ready] | type[Done]) -> Ready | Done:
        """The next report of a kind; progress on the way is kept. Raises ``WorkerError`` when the process is gone."""
        while line := await self._output.readline():
            report: Report = self._decoder.decode(line)
            if isinstance(report, Progress):
                self.progress = report
            elif isinstance(report, Broken):
                raise WorkerError(f"a process of the load generator failed: {report.reason}")
            elif isinstance(report, wanted):
                return report
        raise WorkerError(f"a process of the load generator ended with exit code {await self.process.wait()}")


class Pool:
    """Worker processes for a run. ``async with`` it; ``run`` once a load point.

    Args:
        setups: one a process.
        folder: for the files that pass to and from the processes.
    """

    def __init__(self, setups: Sequence[Setup], folder: Path) -> None:
        self._setups = setups
        self._folder = folder
        self._processes: list[_Process] = []

    async def __aenter__(self) -> Pool:
        for setup in self._setups:
            words = [sys.executable, "-m", "toolkit.loadgen.worker", msgspec.json.encode(setup).decode()]
            process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_BYTES
            )
            self._processes.append(_Process(process))
        return self

    async def __aexit__(self, *error: object) -> None:
        for one in self._processes:
            if one.process.stdin is not None:
                one.process.stdin.close()
        for one in self._processes:
            try:
                await asyncio.wait_for(one.process.wait(), STOP_S)
            except TimeoutError:
                one.process.kill()

    def files(self, load: Load) -> list[CallsFile]:
        """A file for each process that takes part in the point. Give conversation i to ``files[owner(i)]``."""
        count = min(len(self._processes), load.slots or len(self._processes))
        return [CallsFile(self._folder, f"{load.index}-{number}") for number in range(count)]

    async def run(
        self, load: Load, files: Sequence[CallsFile], progress: Callable[[Progress], None], interval_s: float
    ) -> Result:
        """Runs the point.

        Cancelling it stops the point early: calls in flight end as cancelled, and the rows so far are returned as an
        interrupted result. Raises ``WorkerError``.
        """
        processes = self._processes[: len(files)]
        for number, (one, file) in enumerate(zip(processes, files, strict=True)):
            file.close()
            one.progress = Progress(0, 0, 0)
            one.tell(_share(load, file, number, len(files)))
        interrupted = False
        try:
            await asyncio.gather(*(one.hear(Ready) for one in processes))
        except asyncio.CancelledError:
            interrupted = True
        for one in processes:
            one.tell(Stop() if interrupted else Go())
        waiting = asyncio.gather(*(one.hear(Done) for one in processes))
        while not waiting.done():
            try:
                await asyncio.wait([waiting], timeout=interval_s)
            except asyncio.CancelledError:
                interrupted = True
                for one in processes:
                    one.tell(Stop())
            progress(_total([one.progress for one in processes]))
        done = [report for report in waiting.result() if isinstance(report, Done)]
        evidence = [report.evidence for report in done]
        rows, raw = _tables([f.rows_path for f in files]), _tables([f.raw_path for f in files])
        for file in files:
            file.remove()
        return Result(rows or requests_schema().empty_table(), raw, evidence, interrupted)


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
        reads=sum(part.reads for part in parts),
        parsing=any(part.parsing for part in parts),
    )


def _tables(paths: Sequence[Path]) -> pa.Table | None:
    """The processes' Arrow files as one table; None where there is none."""
    import pyarrow as pa

    tables = []
    for path in paths:
        if path.exists():
            with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
                tables.append(reader.read_all())
    return pa.concat_tables(tables) if tables else None
