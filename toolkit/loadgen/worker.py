"""One process of the load generator: its share of a load point, and what it saw of itself while running it.

Owns a transport and, for each point, an arrival over its own calls. It is told what to do by ``pool.py`` in lines of
JSON on standard input and answers the same way on standard output; rows go into an Arrow file. Nothing of an answer
is parsed before the point's last call has ended, except to continue a conversation.

Read next: ``sockets.py``, ``answers.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.loadgen.answers import to_record
from toolkit.loadgen.arrival import Arrival, ClosedLoop, OpenLoop, conversations_of
from toolkit.loadgen.exchange import Call, Client, Exchange, Raw, Spool
from toolkit.loadgen.openai_api import continue_body
from toolkit.loadgen.proof import Evidence, in_flight
from toolkit.loadgen.wire import RAW_SUFFIX, Broken, Command, Done, Go, Point, Progress, Ready, Report, Setup
from toolkit.records import RequestRecord, raw_schema, requests_schema, requests_table

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

REPORT_S = 0.25
CLOCK_NS = 20_000_000
STEP_NS = 1_000_000  # NTP slews by 0.05 %: far less between two looks at the clock
BATCH = 1000  # rows parsed before they are written


def make_client(setup: Setup, spool: Spool, on_done: Callable[[Exchange], None]) -> Client:
    """The transport that ``setup`` names. Call it inside the event loop."""
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    headers |= setup.headers
    if key := os.environ.get(setup.api_key_env, "") if setup.api_key_env else "":
        headers["Authorization"] = f"Bearer {key}"
    if setup.transport == "socket":
        from toolkit.loadgen.sockets import SocketClient

        return SocketClient(setup.url, headers, setup.timeout_s, spool, on_done)
    from toolkit.loadgen.http_client import AiohttpClient

    return AiohttpClient(setup.url, headers, setup.timeout_s, spool, on_done)


class Worker:
    """Runs load points over one transport. ``async with`` it; ``measure`` once a point."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.exchanges: list[Exchange] = []
        self.failed = 0

    async def __aenter__(self) -> Worker:
        self.spool = Spool(Path(tempfile.mkstemp(prefix="loadgen-")[1]))
        self.client = make_client(self.setup, self.spool, self._take)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()
        self.spool.close()

    def _take(self, exchange: Exchange) -> None:
        """Files one ended exchange; called while latencies are taken. Its bytes leave memory: a run may be long."""
        self.exchanges.append(exchange)
        self.spool.put(exchange)
        exchange.ended_ns = exchange.last_ns
        self.failed += exchange.outcome != "ended" or exchange.refused

    async def measure(self, point: Point, calls: list[Call], bodies: bytes | mmap.mmap) -> Evidence:
        """Sends every call; the exchanges are in ``exchanges`` then. When cancelled, so are the calls in flight."""
        self.exchanges, self.failed = [], 0
        self.spool.clear()
        arrival: Arrival = (
            OpenLoop(point.slots)
            if point.open_loop
            else ClosedLoop(point.slots, point.ramp_s, point.offset, point.stride)
        )
        evidence, opened = Evidence(), self.client.opened
        turns: dict[str, bytes] = {}

        async def send(call: Call, due_ns: int) -> Exchange:
            body = bodies[call.offset : call.offset + call.length]
            if call.session:
                body = turns[call.session] = continue_body(turns.get(call.session, b""), body)
            exchange = await self.client.send(call, body, due_ns)
            if call.session:
                turns[call.session] = self._with_answer(body, exchange)
            return exchange

        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        async with _watch_clock(evidence) as late_ns:
            try:
                with quiet_heap():
                    await arrival.run(conversations_of(calls), send)
            finally:
                after = resource.getrusage(resource.RUSAGE_SELF)
                evidence.window_s = time.perf_counter() - began
                evidence.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                evidence.cpu_share = evidence.cpu_s / max(evidence.window_s, 1e-9)
                evidence.opened = self.client.opened - opened
                if self.setup.transport == "aiohttp":
                    evidence.lag.add(np.array(late_ns, np.int64))
                if isinstance(arrival, ClosedLoop):
                    self._count_held(arrival, evidence)
                else:
                    due = [max(0, x.sent_ns - x.due_ns) for x in self.exchanges]
                    evidence.schedule_lag.add(np.array(due, np.int64))
        return evidence

    def rows(self, point: Point, evidence: Evidence) -> Iterator[tuple[RequestRecord, Raw]]:
        """Every exchange's row and bytes, in the order in which they ended; adds what they show to ``evidence``."""
        before = time.process_time()
        lags: list[NDArray[np.int64]] = []
        for exchange in self.exchanges:
            raw = self.spool.get(exchange)
            record, coalesced = to_record(exchange, raw, point.index, point.concurrency)
            if exchange.kernel_stamped:
                lags.append(raw.read_ns - raw.kernel_ns)
            if len(lags) == BATCH:
                evidence.lag.add(np.concatenate(lags))
                lags.clear()
            self._count(evidence, exchange, record, coalesced.late)
            if not self.setup.record_text:
                record.output_text = ""
            yield record, raw
        if lags:
            evidence.lag.add(np.concatenate(lags))
        evidence.parse_cpu_s = time.process_time() - before
        evidence.peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _count(self, evidence: Evidence, exchange: Exchange, record: RequestRecord, late: int) -> None:
        evidence.resent += exchange.resent
        evidence.unstamped += not exchange.kernel_stamped
        evidence.token_chunks += len(record.chunk_s) + record.coalesced
        evidence.output_tokens += record.output_tokens
        evidence.coalesced_chunks += record.coalesced
        evidence.blurred_chunks += late
        if record.status == "ok" and not record.warmup:
            evidence.count_mismatches += sum(record.chunk_tokens) != record.output_tokens
            evidence.length_mismatches += record.expected_output_tokens not in (0, record.output_tokens)

    def _with_answer(self, body: bytes, exchange: Exchange) -> bytes:
        record, _ = to_record(exchange, self.spool.get(exchange), 0, 0)
        return continue_body(body, msgspec.json.encode({"messages": [_assistant(record.output_text)]}))

    def _count_held(self, arrival: ClosedLoop, evidence: Evidence) -> None:
        sent = [x.sent_ns for x in self.exchanges]
        ended = [x.ended_ns for x in self.exchanges]
        evidence.in_flight_s, evidence.asked_s = in_flight(
            sent, ended, arrival.full_ns, arrival.drained_ns, arrival.concurrency
        )


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@contextlib.contextmanager
def quiet_heap() -> Iterator[None]:
    """Keeps the garbage collector away while latencies are taken."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.asynccontextmanager
async def _watch_clock(evidence: Evidence) -> AsyncIterator[list[int]]:
    """Counts how often the wall clock, which the kernel's stamps are on, is set meanwhile.

    Gives how late each look at the clock was, ns: what stands in for the lag of reads where the kernel stamps none.
    """
    late: list[int] = []

    async def watch() -> None:
        offset = time.time_ns() - time.monotonic_ns()
        while True:
            due = time.monotonic_ns() + CLOCK_NS
            await asyncio.sleep(CLOCK_NS * 1e-9)
            late.append(max(0, time.monotonic_ns() - due))
            now = time.time_ns() - time.monotonic_ns()
            evidence.clock_steps += abs(now - offset) > STEP_NS
            offset = now

    task = asyncio.create_task(watch())
    try:
        yield late
    finally:
        task.cancel()


# --- the process ------------------------------------------------------------------------------------


class _Process:
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
            worker = self.worker
            _report(Progress(len(worker.exchanges), worker.failed, worker.client.reads))
        stopping.cancel()
        return measuring.result(), False

    def _write_rows(self, point: Point, evidence: Evidence) -> None:
        import pyarrow as pa

        worker, batch, raws = self.worker, list[RequestRecord](), list[Raw]()
        keep_raw = worker.setup.record_raw
        with contextlib.ExitStack() as files:
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

            for record, raw in worker.rows(point, evidence):
                batch.append(record)
                raws.append(raw)
                if len(batch) == BATCH:
                    write()
                    _report(Progress(len(worker.exchanges), worker.failed, worker.client.reads, parsing=True))
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


def main(words: list[str]) -> int:
    """Entry of the process; ``words`` is the JSON of ``Setup``."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent decides, and has the results
        signal.signal(number, signal.SIG_IGN)
    import pyarrow  # noqa: F401  its import is spent here, not in a load point
    import uvloop

    setup = msgspec.json.decode(words[0], type=Setup)
    if setup.cpu >= 0:
        os.sched_setaffinity(0, {setup.cpu})

    async def run() -> None:
        async with Worker(setup) as worker:
            await _Process(worker).run()

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
