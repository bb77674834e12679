"""One process of the load generator: its share of a load point, and what it saw of itself while running it.

Owns a transport and, for each point, an arrival over its own calls. Nothing of an answer is parsed before the point's
last call has ended, except to continue a conversation.

Read next: ``process.py``, around it; ``sockets.py``, ``answers.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.loadgen.answers import Reader
from toolkit.loadgen.arrival import Arrival, ClosedLoop, OpenLoop, conversations_of
from toolkit.loadgen.exchange import Call, Client, Exchange, Spool
from toolkit.loadgen.openai_api import continue_body
from toolkit.loadgen.proof import Evidence, in_flight
from toolkit.loadgen.wire import Point, Progress, Setup
from toolkit.records.requests import RequestRecord

if TYPE_CHECKING:
    pass

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
        self.failed = self.cancelled = 0

    async def __aenter__(self) -> Worker:
        self.spool = Spool(Path(tempfile.mkstemp(prefix="loadgen-")[1]))
        self.client = make_client(self.setup, self.spool, self._take)
        self._reader = Reader(self.spool)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()
        self._reader.close()
        self.spool.close()

    def _take(self, exchange: Exchange) -> None:
        """Files one ended exchange; called while latencies are taken. Its bytes leave memory: a run may be long."""
        self.exchanges.append(exchange)
        self.spool.put(exchange)
        exchange.ended_ns = exchange.last_ns
        self.failed += exchange.outcome in ("error", "timeout") or (exchange.outcome == "ended" and exchange.refused)
        self.cancelled += exchange.outcome == "cancelled"

    async def measure(self, point: Point, calls: list[Call], bodies: bytes | mmap.mmap) -> Evidence:
        """Sends every call; the exchanges are in ``exchanges`` then. When cancelled, so are the calls in flight."""
        self.exchanges, self.failed, self.cancelled = [], 0, 0
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

    def progress(self, parsing: bool = False) -> Progress:
        return Progress(len(self.exchanges), self.failed, self.cancelled, self.client.reads, parsing)

    def rows(self, point: Point, evidence: Evidence) -> Iterator[tuple[RequestRecord, Exchange]]:
        """Every exchange and its row, in the order in which they ended; adds what they show to ``evidence``."""
        before = time.process_time()
        lags: list[NDArray[np.int64]] = []
        for exchange in self.exchanges:
            record, lag_ns, late = self._reader.read(exchange, point.index, point.concurrency)
            if exchange.kernel_stamped:
                lags.append(lag_ns)
            if len(lags) == BATCH:
                evidence.lag.add(np.concatenate(lags))
                lags.clear()
            self._count(evidence, exchange, record, late)
            if not self.setup.record_text:
                record.output_text = ""
            yield record, exchange
        if lags:
            evidence.lag.add(np.concatenate(lags))
        evidence.parse_cpu_s = time.process_time() - before
        evidence.peak_rss_mb = peak_rss_mb()

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
        record = self._reader.read(exchange, 0, 0).record
        return continue_body(body, msgspec.json.encode({"messages": [_assistant(record.output_text)]}))

    def _count_held(self, arrival: ClosedLoop, evidence: Evidence) -> None:
        # A pause that was asked for is part of the conversation that holds the slot.
        sent = [x.sent_ns - round(x.call.think_s * 1e9 if x.call.turn else 0) for x in self.exchanges]
        ended = [x.ended_ns for x in self.exchanges]
        evidence.in_flight_s, evidence.asked_s = in_flight(
            sent, ended, arrival.full_ns, arrival.drained_ns, arrival.concurrency
        )


def peak_rss_mb() -> float:
    """The most memory this process has had. ``ru_maxrss`` begins with the memory of the process that started it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@contextlib.contextmanager
def quiet_heap() -> Iterator[None]:
    """Keeps the garbage collector away while latencies are taken."""
    gc.collect()
    gc.freeze()
    try:
        with uncollected():
            yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: nothing that is made meanwhile refers to itself."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
