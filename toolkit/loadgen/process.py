"""The process around a ``Worker``. ``pool.py`` tells it what to do in lines of JSON on standard input; it answers the
same way on standard output, and writes rows into an Arrow file.

Read next: ``worker.py``, ``wire.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.abc
import logging
import mmap
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from toolkit.loadgen.exchange import Call, Raw
from toolkit.loadgen.proof import Evidence
from toolkit.loadgen.wire import RAW_SUFFIX, Broken, Command, Done, Go, Point, Ready, Report, Setup
from toolkit.loadgen.worker import BATCH, Worker, uncollected
from toolkit.records.requests import RequestRecord, raw_schema, requests_schema, requests_table

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

REPORT_S = 0.25


class Process:
    """Standard input to commands, reports to standard output."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.commands: asyncio.Queue[Command | None] = asyncio.Queue()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
        listening = asyncio.create_task(self._listen(reader))
        while isinstance(command := await self.commands.get(), Point):
            await self._point(command)
        listening.cancel()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        decoder = msgspec.json.Decoder(Command)
        while line := await reader.readline():
            self.commands.put_nowait(decoder.decode(line))
        self.commands.put_nowait(None)

    async def _point(self, point: Point) -> None:
        calls = _read_calls(Path(point.calls))
        with _mapped(Path(point.bodies)) as bodies:
            await self.worker.client.connect(min(point.slots or len(calls), len(calls)))
            _report(Ready())
            if not isinstance(await self.commands.get(), Go):
                _report(Done(Evidence(), True))
                return
            evidence, interrupted = await self._until_stopped(point, calls, bodies)
        self._write_rows(point, evidence)
        _report(Done(evidence, interrupted))

    async def _until_stopped(self, point: Point, calls: list[Call], bodies: bytes | mmap.mmap) -> tuple[Evidence, bool]:
        measuring = asyncio.create_task(self.worker.measure(point, calls, bodies))
        stopping = asyncio.create_task(self.commands.get())
        while not measuring.done():
            await asyncio.wait([measuring, stopping], timeout=REPORT_S, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not measuring.done():
                measuring.cancel()
                await asyncio.wait([measuring])
                return Evidence(), True
            _report(self.worker.progress())
        stopping.cancel()
        return measuring.result(), False

    def _write_rows(self, point: Point, evidence: Evidence) -> None:
        import pyarrow as pa

        worker, batch, raws = self.worker, list[RequestRecord](), list[Raw]()
        keep_raw = worker.setup.record_raw
        with uncollected(), contextlib.ExitStack() as files:
            rows_file = files.enter_context(pa.OSFile(point.rows, "wb"))
            rows = files.enter_context(pa.ipc.new_file(rows_file, requests_schema()))
            raw_file = files.enter_context(pa.OSFile(point.rows + RAW_SUFFIX, "wb")) if keep_raw else None
            raw_rows = files.enter_context(pa.ipc.new_file(raw_file, raw_schema())) if keep_raw else None

            def write() -> None:
                rows.write_table(requests_table(batch))
                if raw_rows is not None:
                    raw_rows.write_table(_raw_table(batch, raws))
                batch.clear()
                raws.clear()

            for record, exchange in worker.rows(point, evidence):
                batch.append(record)
                if keep_raw:
                    raws.append(worker.spool.get(exchange))
                if len(batch) == BATCH:
                    write()
                    _report(worker.progress(parsing=True))
            write()


def _raw_table(records: Sequence[RequestRecord], raws: Sequence[Raw]) -> pa.Table:
    """The bytes of answers, read by read, with the kernel's time of each in Unix nanoseconds."""
    import pyarrow as pa

    columns = {
        "request_id": [record.request_id for record in records],
        "read_ns": [raw.kernel_ns for raw in raws],
        "data": [raw.parts() for raw in raws],
    }
    return pa.table(columns, schema=raw_schema())


def _read_calls(path: Path) -> list[Call]:
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Call])


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[bytes | mmap.mmap]:
    """A file's bytes without holding them in memory."""
    if not path.stat().st_size:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def _report(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


class _NoPandas(importlib.abc.MetaPathFinder):
    """Arrow imports pandas to ask whether a list of ours is one of its own: half a second and 50 MB for nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ImportError("not needed in a process of the load generator")


def main(words: list[str]) -> int:
    """Entry of the process; ``words`` is the JSON of ``Setup``."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent decides, and has the results
        signal.signal(number, signal.SIG_IGN)
    sys.meta_path.insert(0, _NoPandas())
    import pyarrow  # noqa: F401  its import is spent here, not in a load point
    import uvloop

    setup = msgspec.json.decode(words[0], type=Setup)
    if setup.cpu >= 0:
        os.sched_setaffinity(0, {setup.cpu})

    async def run() -> None:
        async with Worker(setup) as worker:
            await Process(worker).run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    except Exception as error:
        log.exception("the process failed")
        _report(Broken(f"{type(error).__name__}: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
