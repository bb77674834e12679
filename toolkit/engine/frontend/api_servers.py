"""ApiServers: the frontend's side of its API servers: starts them, carries their flights, and ends with them.

One that ends by itself takes the frontend with it, for its connections are lost.
Read next: ``relay.py`` (what is said), ``api_server.py`` (who says it).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Protocol

from toolkit.engine.args import FrontendArgs
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.fleet import Fleet, FleetFlight
from toolkit.engine.frontend.http_server import HttpServer, cannot_bind
from toolkit.engine.frontend.metrics import Sample
from toolkit.engine.frontend.relay import (
    Begin,
    Close,
    Drop,
    Failed,
    Given,
    Link,
    Listening,
    Open,
    Opened,
    Ready,
    Refused,
    Scrape,
    Scraped,
    Standing,
    Start,
)
from toolkit.engine.messages import Output

log = logging.getLogger(__name__)

LOOK_S = 0.05  # between two looks at how the workers are
SCRAPE_TIMEOUT_S = 2.0
END_TIMEOUT_S = 10.0
INFO = ("max_model_len", "max_total_tokens")  # what API servers need to know of the ranks


class Process(Protocol):
    async def wait(self) -> int: ...

    def kill(self) -> None: ...


Spawn = Callable[[socket.socket], Awaitable[Process]]


async def spawn(end: socket.socket) -> Process:
    """An API server as a process of this Python. Its log is this process's."""
    command = (sys.executable, "-m", "toolkit.engine.frontend", "--api-server", str(end.fileno()))
    return await asyncio.create_subprocess_exec(*command, pass_fds=(end.fileno(),))


class ApiServer:
    """One of them, as the frontend sees it. A ``flight.Sink`` of all its requests.

    ``on_end``: called with the reason when it cannot go on.
    """

    def __init__(self, name: str, fleet: Fleet, link: Link, process: Process, on_end: Callable[[str], None]) -> None:
        self.listening, self.ready = asyncio.Event(), False
        self._name, self._fleet, self._link, self._process, self._on_end = name, fleet, link, process, on_end
        self._flights: dict[int, FleetFlight] = {}
        self._outputs: list[Output] = []
        self._scraped: asyncio.Future[list[Sample]] | None = None
        self._listening = asyncio.create_task(self._listen())

    def put(self, output: Output) -> None:
        """Goes with all else that this turn of the event loop brings."""
        if not self._outputs:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outputs.append(output)

    def tell(self, standing: Standing) -> None:
        self._link.send(standing)

    async def samples(self) -> list[Sample]:
        """Its metrics; none when it does not answer in time."""
        if self._scraped is None:
            self._scraped = asyncio.get_running_loop().create_future()
            self._link.send(Scrape())
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                return await asyncio.shield(self._scraped)
        except TimeoutError:
            log.warning("%s gave no metrics within %g s", self._name, SCRAPE_TIMEOUT_S)
            return []

    async def end(self) -> None:
        """After it has what has come for it."""
        self._listening.cancel()
        self._flush()
        self._close_flights()
        await self._link.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            log.error("%s does not end: it is killed", self._name)
            self._process.kill()

    def _close_flights(self) -> None:
        for flight in self._flights.values():
            flight.close()
        self._flights.clear()

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._link.send(Given(outputs))

    async def _listen(self) -> None:
        try:
            while True:
                match await self._link.from_server():
                    case Open(number, prompt, num_requests):
                        self._open(number, prompt, num_requests)
                    case Start(number, rid, sampling):
                        if number in self._flights:
                            self._flights[number].send(rid, sampling)
                    case Drop(number, rid):
                        if number in self._flights:
                            self._flights[number].abort(rid)
                    case Close(number):
                        if number in self._flights:
                            self._flights.pop(number).close()
                    case Scraped(samples):
                        if self._scraped is not None:
                            self._scraped.set_result(samples)
                            self._scraped = None
                    case Listening():
                        self.listening.set()
                    case Ready():
                        self.ready = True
                    case Failed(reason):
                        await self._fleet.fail(reason)
        except EOFError:
            self._on_end(f"{self._name} has ended")
        except Exception as error:
            log.exception("%s: what it says cannot be followed", self._name)
            self._on_end(f"{self._name}: {error}")
        finally:
            self.listening.set()  # or never will
            self._close_flights()

    def _open(self, number: int, prompt: list[int], num_requests: int) -> None:
        try:
            flight = self._fleet.open(prompt, num_requests, self)
        except ApiError as error:
            self._link.send(Refused(number, error.message, error.code, error.retry_after_s))
            return
        self._flights[number] = flight
        self._link.send(Opened(number, flight.label))


class ApiServers:
    """All of them. ``await start()``, then ``await end()``.

    Args:
        on_end: called with the reason when one of them cannot go on.
    """

    def __init__(
        self, args: FrontendArgs, fleet: Fleet, api_key: str, on_end: Callable[[str], None], spawn: Spawn = spawn
    ) -> None:
        self._args, self._fleet, self._api_key, self._on_end, self._spawn = args, fleet, api_key, on_end, spawn
        self._all: list[ApiServer] = []
        self._looking: asyncio.Task[None] | None = None
        # Nobody else may look into it; and a socket's path has room for 107 characters, which TMPDIR may exceed.
        folder = "/tmp" if os.access("/tmp", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="wideep-", dir=folder)

    @property
    def num_ready(self) -> int:
        return sum(server.ready for server in self._all)

    @property
    def ready(self) -> bool:
        return self.num_ready == self._args.api_servers

    async def start(self, http: HttpServer) -> None:
        """``http``: answers what they do not answer themselves. ``ValueError``: the port is taken."""
        _check_free(*self._args.http)
        operations = f"{self._folder.name}/operations"
        await http.listen_here(operations)
        num = self._args.api_servers
        for index in range(num):
            here, there = socket.socketpair()
            with there:
                process = await self._spawn(there)
            link = await Link.of(here)
            link.send(Begin(self._args, index, num, operations, self._api_key))
            self._all.append(ApiServer(f"API server {index}", self._fleet, link, process, self._on_end))
        self._looking = asyncio.create_task(self._look())
        await asyncio.gather(*(server.listening.wait() for server in self._all))

    async def samples(self) -> list[Sample]:
        """The metrics of all."""
        return [sample for samples in await asyncio.gather(*(s.samples() for s in self._all)) for sample in samples]

    async def end(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.gather(*(server.end() for server in self._all))
        self._folder.cleanup()

    async def _look(self) -> None:
        """Tells all how the workers are, when that has changed."""
        last = Standing("loading")
        try:
            while True:
                state = self._fleet.state
                info = {key: self._fleet.info_min(key) for key in INFO} if state == "ready" else {}
                now = Standing(state, self._fleet.failure, info)
                if now != last:
                    last = now
                    for server in self._all:
                        server.tell(now)
                await asyncio.sleep(LOOK_S)
        except Exception as error:
            log.exception("API servers cannot be told how the workers are")
            self._on_end(f"frontend: {error}")


def _check_free(host: str, port: int) -> None:
    """A port that several processes share could be shared with another run's by mistake."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise cannot_bind(host, port, error) from None
