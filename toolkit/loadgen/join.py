"""``python -m toolkit.loadgen join HOST:PORT``: the worker group of a node that does not lead.

Starts the worker processes that the leader asks for, hands on what it says to them and what they report, and passes
files both ways. Takes no part in what is sent or measured: the workers do that on this node's own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit.loadgen.links import (
    TOKEN_ENV,
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
    parse_address,
    write_part,
)
from toolkit.loadgen.pool import LocalWorker, allowed_cores, pinned
from toolkit.loadgen.wire import RAW_SUFFIX, Broken, Done, Point

log = logging.getLogger(__name__)

CONNECT_S = 120.0  # the leader may be started after the group

USAGE = f"""\
Runs this node's part of a load generator that another node leads (nodes=N there).

  python -m toolkit.loadgen join HOST:PORT      HOST:PORT is what the leader was given as listen=

{TOKEN_ENV} must hold the same secret in the environment of both. Under srun, one command serves all nodes:

  export {TOKEN_ENV}=$(openssl rand -hex 16)
  srun -N4 --ntasks-per-node=1 python -m toolkit.loadgen nodes=4 listen=$(hostname):7007 url=... concurrency=[4096]

The first task leads; the others join it."""


def main(words: Sequence[str]) -> int:
    """Runs the words after ``join``; returns the exit status."""
    if len(words) != 1 or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
        return 0 if words and words[0] in ("-h", "--help") else 2
    try:
        address = parse_address(words[0], "join")
        token = read_token()
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        asyncio.run(_join(address, token))
    except LinkError as error:
        log.error("%s:%d: %s", *address, error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def read_token() -> str:
    """The run's secret. Raises ``ValueError`` when there is none."""
    token = os.environ.get(TOKEN_ENV, "")
    if not token:
        raise ValueError(
            f"{TOKEN_ENV} is not set: a load generator on several nodes needs one secret on all of them, for example "
            f"export {TOKEN_ENV}=$(openssl rand -hex 16)"
        )
    return token


async def _join(address: tuple[str, int], token: str) -> None:
    _outlive_the_first_signal()
    link = await _connect(address)
    try:
        await link.send(Hello(token, socket.gethostname(), len(allowed_cores())))
        begin = await link.receive()
        if isinstance(begin, Refused):
            raise LinkError(begin.reason)
        if not isinstance(begin, Begin):
            raise LinkError(f"the leader began with {type(begin).__name__}")
        log.info("joined %s:%d with %d process(es)", *address, begin.workers)
        with tempfile.TemporaryDirectory(prefix="loadgen-") as folder:
            await _Group(link, Path(folder)).run(begin)
    finally:
        link.close()


def _outlive_the_first_signal() -> None:
    """A signal goes to all nodes, and the leader then wants what this one has measured. The second one counts."""
    loop = asyncio.get_running_loop()

    def heard(number: signal.Signals) -> None:
        log.info("%s: this node ends when the leader does; once more ends it now", number.name)
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(one)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard, number)


async def _connect(address: tuple[str, int]) -> Link:
    began = time.monotonic()
    while True:
        try:
            return Link(*await asyncio.open_connection(*address))
        except OSError as error:
            if time.monotonic() - began > CONNECT_S:
                raise LinkError(f"nobody leads there after {CONNECT_S:.0f} s: {error.strerror or error}") from None
            await asyncio.sleep(0.25)


class _Group:
    """The node's workers, between their pipes and the leader's connection."""

    def __init__(self, link: Link, folder: Path) -> None:
        self._link = link
        self._folder = folder
        self._workers: list[LocalWorker] = []

    async def run(self, begin: Begin) -> None:
        """Until the leader closes the connection."""
        listening: list[asyncio.Task[None]] = []
        try:
            for number, setup in enumerate(pinned(begin.setup, begin.workers, begin.pin)):
                worker = await LocalWorker.start(setup)
                self._workers.append(worker)
                listening.append(asyncio.create_task(self._pass_reports(number, worker)))
            with contextlib.suppress(LinkError):  # the leader has ended
                while True:
                    await self._take(await self._link.receive())
        finally:
            for task in listening:
                task.cancel()
            await asyncio.gather(*(worker.close() for worker in self._workers))

    async def _take(self, frame: object) -> None:
        match frame:
            case Ping():
                await self._link.send(Pong(time.time_ns()))
            case Part():
                write_part(self._path(frame.worker, frame.kind), frame)
            case Tell(worker, Point() as point):
                self._workers[worker].tell(self._here(worker, point))
            case Tell(worker, command):
                self._workers[worker].tell(command)
            case _:
                raise LinkError(f"the leader sent {type(frame).__name__}")

    async def _pass_reports(self, number: int, worker: LocalWorker) -> None:
        async for report in worker.reports():
            if isinstance(report, Done):
                rows, raw = self._path(number, "rows"), self._path(number, "raw")
                for kind, path in (("rows", rows), ("raw", raw)):
                    if path.exists():
                        await self._link.send_file(number, "rows" if kind == "rows" else "raw", path)
                        path.unlink()
            await self._link.send(Heard(number, report))
        await self._link.send(Heard(number, Broken(f"it ended with exit code {await worker.ended()}")))

    def _path(self, worker: int, kind: str) -> Path:
        return self._folder / (f"{worker}.rows{RAW_SUFFIX}" if kind == "raw" else f"{worker}.{kind}")

    def _here(self, worker: int, point: Point) -> Point:
        """The leader's point with this node's files."""
        paths = {kind: str(self._path(worker, kind)) for kind in ("calls", "bodies", "rows")}
        return msgspec.structs.replace(point, **paths)
