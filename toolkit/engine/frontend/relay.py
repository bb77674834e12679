"""Relay: how API servers, processes that answer HTTP, reach the one frontend process that talks to the ranks.

The frontend keeps what must be in one place: the wake rule, routing, handoffs, retries, the count of open requests.
An API server parses, tokenizes, detokenizes and writes events, the work that grows with tokens. Between them is a
socket pair: MessagePack, a length before each message; what came of one step of a DP rank goes in one of them.
Knows no HTTP. Read next: ``api_servers.py`` (the frontend's side), ``api_server.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import Callable, Iterator

import msgspec

from toolkit.engine.args import FrontendArgs
from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.flight import Mailbox, State
from toolkit.engine.frontend.metrics import Sample
from toolkit.engine.messages import Output

# --- frontend -> API server ---------------------------------------------------------------------------


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The first message. ``operations``: Unix socket that answers what API servers do not."""

    args: FrontendArgs
    index: int
    num: int
    operations: str
    api_key: str


class Standing(msgspec.Struct, tag=True, frozen=True):
    """How the workers are: sent when it changes. ``info``: as ``Fleet.info_min`` gives it, once it is ready."""

    state: State
    failure: str = ""
    info: dict[str, int] = {}


class Opened(msgspec.Struct, tag=True, frozen=True):
    """A flight's DP rank."""

    flight: int
    label: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A flight that cannot be: what the client is told."""

    flight: int
    message: str
    code: str | None
    retry_after_s: int


class Given(msgspec.Struct, tag=True, frozen=True):
    """What has come of requests."""

    outputs: list[Output]


class Scrape(msgspec.Struct, tag=True, frozen=True):
    """Asks for ``Scraped``."""


ToServer = Begin | Standing | Opened | Refused | Given | Scrape

# --- API server -> frontend ---------------------------------------------------------------------------


class Listening(msgspec.Struct, tag=True, frozen=True):
    """Clients can connect."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """It has its tokenizer, and knows that the workers are ready."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """It will not be ready."""

    reason: str


class Open(msgspec.Struct, tag=True, frozen=True):
    """A flight, for up to ``num_requests``; the API server numbers them."""

    flight: int
    prompt: list[int]
    num_requests: int


class Start(msgspec.Struct, tag=True, frozen=True):
    """A request of a flight."""

    flight: int
    rid: str
    sampling: SamplingParams


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Aborts a request of a flight."""

    flight: int
    rid: str


class Close(msgspec.Struct, tag=True, frozen=True):
    """The flight's requests that have not ended are aborted."""

    flight: int


class Scraped(msgspec.Struct, tag=True, frozen=True):
    """The metrics of this process."""

    samples: list[Sample]


FromServer = Listening | Ready | Failed | Open | Start | Drop | Close | Scraped

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


class Link:
    """One end of a socket pair. ``await Link.of(sock)``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, end: socket.socket) -> Link:
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, message: ToServer | FromServer) -> None:
        """Never waits: what the other end has not read is kept here."""
        data = _encoder.encode(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def to_server(self) -> ToServer:
        """``EOFError``: the frontend is gone."""
        return _to_server.decode(await self._receive())

    async def from_server(self) -> FromServer:
        """``EOFError``: the API server is gone."""
        return _from_server.decode(await self._receive())

    async def _receive(self) -> bytes:
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            raise EOFError from None

    async def close(self) -> None:
        """After what was sent has gone."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class RelayedFlight:
    """A ``flight.Flight`` that the frontend holds."""

    def __init__(self, fleet: RelayedFleet, number: int, prompt: list[int], num_requests: int, mailbox: Mailbox):
        self.label, self.mailbox, self.rids = -1, mailbox, list[str]()
        self._fleet, self._number = fleet, number
        fleet.link.send(Open(number, prompt, num_requests))

    def send(self, rid: str, sampling: SamplingParams) -> None:
        """Starts a request."""
        self.rids.append(rid)
        self._fleet.mailboxes[rid] = self.mailbox
        self._fleet.link.send(Start(self._number, rid, sampling))

    def abort(self, rid: str) -> None:
        """Ends a request, unless it has ended."""
        if self._fleet.mailboxes.pop(rid, None) is not None:
            self._fleet.link.send(Drop(self._number, rid))


class RelayedFleet:
    """A ``flight.Serving``: the workers as an API server sees them. ``run`` takes what the frontend says.

    Args:
        on_ready: called when the workers are ready.

    Attributes:
        mailboxes: where the outputs of each open request go.
    """

    def __init__(self, link: Link, on_ready: Callable[[], None], samples: Callable[[], list[Sample]]) -> None:
        self.link, self.mailboxes = link, dict[str, Mailbox]()
        self._on_ready, self._samples = on_ready, samples
        self._standing = Standing("loading")
        self._flights: dict[int, RelayedFlight] = {}
        self._numbers = itertools.count()

    @property
    def state(self) -> State:
        return self._standing.state

    @property
    def failure(self) -> str:
        return self._standing.failure

    def admit(self, num_requests: int) -> None:
        """``ApiError`` 503 when nothing is served; how many are open is the frontend's to judge, for each flight."""
        if self.failure:
            raise ApiError(503, self.failure, code="failed")

    def info_min(self, key: str) -> int:
        return self._standing.info[key]

    @contextlib.contextmanager
    def flight(self, prompt: list[int], num_requests: int, mailbox: Mailbox) -> Iterator[RelayedFlight]:
        """For up to ``num_requests`` of one prompt. Leaving the block aborts those that have not ended."""
        self.admit(num_requests)
        number = next(self._numbers)
        flight = self._flights[number] = RelayedFlight(self, number, prompt, num_requests, mailbox)
        try:
            yield flight
        finally:
            del self._flights[number]
            for rid in flight.rids:
                self.mailboxes.pop(rid, None)
            self.link.send(Close(number))

    async def run(self) -> None:
        """Until the frontend is gone."""
        with contextlib.suppress(EOFError):
            while True:
                self._take(await self.link.to_server())

    def _take(self, message: ToServer) -> None:
        match message:
            case Given():
                for output in message.outputs:
                    # Unknown: aborted while these tokens were on their way.
                    if (mailbox := self.mailboxes.get(output.rid)) is not None:
                        if output.finish is not None:
                            del self.mailboxes[output.rid]
                        mailbox.put(output)
            case Opened(number, label):
                if number in self._flights:
                    self._flights[number].label = label
            case Refused(number, text, code, retry_after_s):
                if number in self._flights:
                    self._flights[number].mailbox.refuse(ApiError(503, text, code=code, retry_after_s=retry_after_s))
            case Standing():
                self._standing = message
                if message.state == "ready":
                    self._on_ready()
            case Scrape():
                self.link.send(Scraped(self._samples()))
            case Begin():
                raise AssertionError("it has begun")

    async def fail(self, reason: str) -> None:
        """Tells the frontend that this process cannot serve."""
        self.link.send(Failed(reason))

    async def close(self) -> None:
        await self.link.close()
