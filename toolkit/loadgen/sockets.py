"""Requests over own non-blocking sockets, stamped by the kernel when the bytes arrived.

While latencies are taken, a read stores the kernel's receive time (SO_TIMESTAMPNS), the bytes, and nothing else
(``receive/``); the loop being late or busy does not move a stamp. What is in the bytes is found out afterwards
(``answers.py``). A read that returns several packets has one stamp, that of its last: such reads are counted
(``proof.py``). Because a late read costs no accuracy, reads are taken in batches under load (``poller.py``).

Plain HTTP/1.1 to one server. TLS, proxies and systems without kernel stamps: ``http_client.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from time import time_ns
from typing import Any
from urllib.parse import urlsplit

from toolkit.loadgen.exchange import SPILL_BYTES, Call, Exchange, OnDone, Spool, UnreachableError, attempt
from toolkit.loadgen.http1 import Framing, FramingError
from toolkit.loadgen.poller import Poller
from toolkit.loadgen.receive import DONE_LINE, END_OF_STREAM, SO_TIMESTAMPNS, make_receiver

IDLE_S = 4.0  # below the 5 s after which uvicorn closes an idle connection: no race between the two
DRAIN_S = 1.0  # how long after [DONE] the end of the HTTP answer may take before the connection is given up
REFUSED_PAUSE_S = 0.2  # after a connection was refused: a server that restarts must not use up all calls in a moment
CONNECTING = 256  # connections opened at a time, below the usual listen backlog


class SocketClient:
    """``exchange.Client`` over kernel-stamped sockets.

    Args:
        url: of the endpoint, http only.
        spool: takes long answers out of memory.
        on_done: gets every exchange when it has ended.
    """

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float, spool: Spool, on_done: OnDone) -> None:
        parts = urlsplit(url)
        assert parts.scheme == "http" and parts.hostname, url
        self.opened = 0
        self.receiver = make_receiver(spool)
        self._host, self._port = parts.hostname, parts.port or 80
        lines = {"Host": parts.netloc.rpartition("@")[2], **headers}
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), ""]
        self._head = "\r\n".join(head).encode("latin-1")
        self._timeout_s = timeout_s
        self._on_done = on_done
        self._address: tuple[int, Any] | None = None
        self._idle: list[_Connection] = []
        self._sticky: dict[str, _Connection] = {}
        self._poller = Poller(self.receiver)

    @property
    def reads(self) -> int:
        return self.receiver.reads

    async def connect(self, count: int) -> None:
        """Fails silently: what cannot be opened now is opened, or reported, with the call that needs it."""
        for connection in self._idle:
            if connection.stale():
                connection.close()
        self._idle = [connection for connection in self._idle if not connection.closed]
        while (missing := count - len(self._idle)) > 0:
            opened = await asyncio.gather(
                *(self._open() for _ in range(min(missing, CONNECTING))), return_exceptions=True
            )
            good = [one for one in opened if isinstance(one, _Connection)]
            self._idle += good
            if len(good) < len(opened):
                return

    async def send(self, call: Call, body: bytes, due_ns: int) -> Exchange:
        exchange = Exchange(call, due_ns)
        request = self._request(call, body)
        self._poller.breathe()
        try:
            await attempt(exchange, lambda: self._exchange(exchange, request), self._timeout_s, (OSError, FramingError))
        finally:
            self._on_done(exchange)
        if exchange.unreachable:
            await asyncio.sleep(REFUSED_PAUSE_S)
        return exchange

    async def close(self) -> None:
        for connection in [*self._idle, *self._sticky.values()]:
            connection.close()
        self._idle, self._sticky = [], {}
        self._poller.close()
        self.receiver.close()

    def _request(self, call: Call, body: bytes) -> bytes:
        session = f"x-session-id: {call.session}\r\n" if call.session else ""
        own = f"x-request-id: {call.request_id}\r\n{session}Content-Length: {len(body)}\r\n\r\n"
        return b"".join((self._head, own.encode("ascii"), body))

    async def _exchange(self, exchange: Exchange, request: bytes) -> None:
        """One request and its answer; sent once more if an idle connection turns out to be closed by the server."""
        for resend in (False, True):
            connection = None if resend else self._take(exchange.call.session)
            reused = connection is not None
            connection = connection or await self._open()
            try:
                await connection.talk(exchange, request)
            except _ClosedError:
                if not (reused and exchange.empty):
                    raise
                exchange.resent += 1
                continue
            except BaseException:
                connection.close()
                raise
            self._put_back(connection, exchange.call)
            return

    def _take(self, session: str) -> _Connection | None:
        connection = self._sticky.pop(session, None) if session else None
        if connection is not None and not connection.stale():
            return connection
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale():
                return connection
            connection.close()
        return None

    def _put_back(self, connection: _Connection, call: Call) -> None:
        """A conversation that goes on keeps its connection."""
        if connection.closed:
            return
        if call.more_turns:
            self._sticky[call.session] = connection
        else:
            self._idle.append(connection)

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            if self._address is None:
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                self._address = found[0][0], found[0][4]
            family, address = self._address
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise UnreachableError(f"Cannot connect to {self._host}:{self._port}: {error.strerror}") from None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            raise UnreachableError(f"Cannot connect to {self._host}:{self._port}: {error.strerror}") from None
        except BaseException:
            sock.close()
            raise
        self.opened += 1
        return _Connection(self, sock)


class _ClosedError(OSError):
    """The server closed the connection."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the server closed the connection before the answer was complete: {how}")


class _Connection:
    """One socket, watched as long as it is open; at most one exchange at a time."""

    __slots__ = ("_client", "_ended", "_exchange", "_framing", "_inbox", "_loop", "_sock", "closed", "idle_since")

    def __init__(self, client: SocketClient, sock: socket.socket) -> None:
        self.closed = False
        self.idle_since = time.monotonic()
        self._client = client
        self._sock = sock
        self._exchange: Exchange | None = None
        self._framing = Framing()
        self._ended: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._inbox = client.receiver.add(sock, self)

    def stale(self) -> bool:
        """Closed, or idle for so long that the server may be closing it at this moment."""
        return self.closed or time.monotonic() - self.idle_since > IDLE_S

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._inbox.stop()
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            if self._exchange is None:
                self._inbox.free()

    async def talk(self, exchange: Exchange, request: bytes) -> None:
        """Writes the request and waits for the end of its answer. Raises ``OSError`` or ``FramingError``."""
        self._framing = Framing(self._client.receiver.make_walk)
        self._exchange = exchange
        self._ended = self._loop.create_future()
        try:
            await self._write(exchange, request)
            await self._ended
        finally:
            self._store(exchange)
            self._exchange = None
            if self.closed:
                self._inbox.free()
            else:
                self._inbox.loud(True)
            self.idle_since = time.monotonic()

    async def _write(self, exchange: Exchange, request: bytes) -> None:
        rest = memoryview(request)
        while True:
            exchange.sent_ns = time_ns()
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError) as error:
                self._over(_ClosedError(str(error)))
                return
            assert self._ended is not None
            if not rest or self._ended.done():
                return
            writable = self._loop.create_future()
            self._loop.add_writer(self._sock.fileno(), _wake, writable)
            try:
                await writable
            finally:
                self._loop.remove_writer(self._sock.fileno())

    def noticed(self, data: bytes, gone: str) -> None:
        """``receive.Watcher``'s."""
        exchange, framing = self._exchange, self._framing
        if exchange is None:  # the server closes an idle connection, or speaks without being asked
            self.close()
            return
        exchange.held += len(data)
        try:
            complete = framing.feed(data) if data else False
            if not complete and exchange.held > SPILL_BYTES:
                framing.settle()
                self._store(exchange)
        except FramingError as error:
            self._over(error)
            return
        head = framing.head
        if complete:
            self._over(None)
        elif gone == END_OF_STREAM and head is not None and not head.chunked and head.length is None:
            self._over(None)  # a body without a length ends with the connection
        elif gone:
            self._over(_ClosedError(gone))
        elif DONE_LINE in data:
            self._loop.call_later(DRAIN_S, self._give_up, exchange)
        if head is not None and head.chunked:
            self._inbox.loud(False)

    def _store(self, exchange: Exchange) -> None:
        self._inbox.store(exchange)
        exchange.held = 0

    def _give_up(self, exchange: Exchange) -> None:
        if self._exchange is exchange:
            self._over(None)

    def _over(self, error: Exception | None) -> None:
        """The answer has ended, well or not."""
        if self._exchange is not None and self._framing.head is not None:
            self._exchange.refused = self._framing.head.status != 200
        if error is not None or not self._framing.reusable:
            self.close()
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)


def _wake(future: asyncio.Future[None]) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):
        future.set_result(None)
