"""The leader's end of a load generator on several nodes: waits for the other nodes' groups, and makes each of their
worker processes look to ``pool.py`` like one of its own.

Clocks of nodes are not compared: every duration is taken on one node. Where a row stands in time is moved by the
offset between the two clocks, measured at the begin of every point (the round trip of the fastest of ``PINGS`` pings
bounds its error). Read next: ``links.py``, ``join.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

from toolkit.loadgen.links import (
    MAX_HELLO,
    Begin,
    Heard,
    Hello,
    Link,
    LinkError,
    Part,
    Ping,
    Pong,
    Refused,
    Tell,
    write_part,
)
from toolkit.loadgen.pool import WorkerError, share_of_cores
from toolkit.loadgen.wire import RAW_SUFFIX, Broken, Done, Go, Point, Progress, Ready, Report, Setup, Stop

log = logging.getLogger(__name__)

WAIT_S = 600.0  # for all groups to come: nodes of one job step start within seconds of each other
PINGS = 8


class Group:
    """One other node.

    Attributes:
        host: as it calls itself.
        workers: its processes.
        clock_offset_s: its clock minus this node's.
    """

    def __init__(self, link: Link, host: str, workers: int) -> None:
        self.host = host
        self.clock_offset_s = 0.0
        self.workers = [RemoteWorker(self, number) for number in range(workers)]
        self.link = link
        self._pongs: asyncio.Queue[int] = asyncio.Queue()
        self._lock = asyncio.Lock()
        self._point = -1
        self._listening = asyncio.create_task(self._listen())

    async def measure_clock(self, point: int) -> None:
        """Once a point, whichever of its workers asks first."""
        async with self._lock:
            if point == self._point:
                return
            self._point = point
            best = float("inf")
            for _ in range(PINGS):
                before = time.time_ns()
                await self.link.send(Ping())
                theirs, after = await self._pongs.get(), time.time_ns()
                if after - before < best:
                    # In whole ns: a float near 2e18 is rounded to 256.
                    best, self.clock_offset_s = after - before, (2 * theirs - before - after) * 0.5e-9
            log.info("%s: clock offset %+.3f ms, known to %.3f ms", self.host, self.clock_offset_s * 1e3, best * 0.5e-6)

    async def _listen(self) -> None:
        reason = ""
        try:
            while True:
                match await self.link.receive():
                    case Pong(time_ns):
                        self._pongs.put_nowait(time_ns)
                    case Part() as part:
                        self.workers[part.worker].take(part)
                    case Heard(number, report):
                        self.workers[number].said.put_nowait(report)
                    case frame:
                        raise LinkError(f"it sent {type(frame).__name__}")
        except (LinkError, IndexError, OSError) as error:
            reason = str(error)
        for worker in self.workers:
            worker.said.put_nowait(Broken(reason))

    async def close(self) -> None:
        self.link.close()
        self._listening.cancel()


class RemoteWorker:
    """A worker process on another node, as ``pool.Pool`` sees it (``pool.Member``)."""

    def __init__(self, group: Group, number: int) -> None:
        self.progress = Progress(0, 0, 0, 0)
        self.said: asyncio.Queue[Report] = asyncio.Queue()
        self._group, self._number = group, number
        self._rows = self._raw = Path()

    @property
    def clock_offset_s(self) -> float:
        return self._group.clock_offset_s

    async def begin(self, point: Point) -> None:
        self._rows, self._raw = Path(point.rows), Path(point.rows + RAW_SUFFIX)
        link = self._group.link
        try:
            await self._group.measure_clock(point.index)
            await link.send_file(self._number, "calls", Path(point.calls))
            await link.send_file(self._number, "bodies", Path(point.bodies))
            await link.send(Tell(self._number, point))
        except LinkError as error:
            raise WorkerError(f"the load generator's group on {self._group.host}: {error}") from None

    def tell(self, command: Go | Stop) -> None:
        self._group.link.post(Tell(self._number, command))

    async def hear(self, wanted: type[Ready] | type[Done]) -> Ready | Done:
        while True:
            report = await self.said.get()
            if isinstance(report, Progress):
                self.progress = report
            elif isinstance(report, Broken):
                self.said.put_nowait(report)  # it stays broken
                raise WorkerError(f"the load generator's group on {self._group.host} failed: {report.reason}")
            elif isinstance(report, wanted):
                return report

    def take(self, part: Part) -> None:
        """Rows come back as files, before the report that they are whole."""
        write_part(self._raw if part.kind == "raw" else self._rows, part)

    async def close(self) -> None:
        """The group ends its workers when the connection closes."""


@contextlib.asynccontextmanager
async def groups(
    address: tuple[str, int], token: str, count: int, setup: Setup, workers: int, most_in_flight: int, pin: bool
) -> AsyncIterator[list[Group]]:
    """Waits until ``count`` groups have joined, and lets them go at the end.

    Args:
        workers: processes of each; 0: as its cores and ``most_in_flight`` (of one node) suggest.

    Raises:
        WorkerError: they did not all come in time, or the address cannot be used.
    """
    joined: list[Group] = []
    complete = asyncio.Event()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer)
        try:
            hello = await asyncio.wait_for(link.receive(MAX_HELLO), 10.0)
        except (LinkError, TimeoutError):
            link.close()
            return
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), token.encode()):
            log.warning("a connection without the run's secret was refused")
            link.post(Refused("the secret is not this run's"))
        elif len(joined) == count:
            link.post(Refused(f"all {count} groups are here already; the leader was told nodes={count + 1}"))
        else:
            processes = workers or share_of_cores(hello.cores, most_in_flight)
            link.post(Begin(setup, processes, pin))
            joined.append(Group(link, hello.host, processes))
            log.info("%s joined with %d process(es): %d of %d groups", hello.host, processes, len(joined), count)
            if len(joined) == count:
                complete.set()
            return
        link.close()

    try:
        server = await asyncio.start_server(meet, *address)
    except OSError as error:
        raise WorkerError(f"listen={address[0]}:{address[1]} cannot be used: {error.strerror or error}") from None
    try:
        async with server:
            try:
                await asyncio.wait_for(complete.wait(), WAIT_S)
            except TimeoutError:
                raise WorkerError(
                    f"{len(joined)} of {count} groups joined within {WAIT_S:.0f} s; start python -m toolkit.loadgen "
                    f"join {address[0]}:{address[1]} on each of the other nodes"
                ) from None
            yield joined
    finally:
        for group in joined:
            await group.close()
