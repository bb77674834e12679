"""Requests over aiohttp, for what ``sockets.py`` does not do: TLS, proxies, systems without kernel receive stamps.

A read is stamped when the process has it: the event loop being late moves the stamp. The answer is put down as if it
had come over a socket, head first, so that everything after this file is the same for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import aiohttp

from toolkit.loadgen.exchange import SPILL_BYTES, TIMESPEC, Call, Exchange, OnDone, Spool, UnreachableError, attempt
from toolkit.loadgen.receive import DONE_LINE
from toolkit.loadgen.sockets import DRAIN_S, IDLE_S, REFUSED_PAUSE_S

READ_BUFFER = 1 << 20  # aiohttp stops reading a socket at twice this; its 64 KiB would pause fast streams
FRAMING_HEADERS = ("transfer-encoding", "content-length", "content-encoding")  # aiohttp has dealt with them


class AiohttpClient:
    """``exchange.Client`` over an aiohttp session. Arguments as ``SocketClient``'s.

    No limit of its own on connections (aiohttp's default is 100, beyond which calls would wait inside the client):
    the arrival decides how many calls are open. Proxies come from the environment (``HTTPS_PROXY``).
    """

    def __init__(self, url: str, headers: dict[str, str], timeout_s: float, spool: Spool, on_done: OnDone) -> None:
        self.reads = 0
        self.opened = 0
        self.spool = spool
        self._url = url
        self._timeout_s = timeout_s
        self._on_done = on_done
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(self._opened_one)
        trace.on_connection_reuseconn.append(_stamp_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, ttl_dns_cache=None),
            timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER,
            trace_configs=[trace],
            trust_env=True,
        )

    async def connect(self, count: int) -> None:
        """aiohttp opens connections with the calls that need them; ``connections_opened`` says so."""

    async def send(self, call: Call, body: bytes, due_ns: int) -> Exchange:
        exchange = Exchange(call, due_ns)
        exchange.kernel_stamped = False
        try:
            await attempt(exchange, lambda: self._exchange(exchange, body), self._timeout_s, (OSError,))
        finally:
            self._on_done(exchange)
        if exchange.unreachable:
            await asyncio.sleep(REFUSED_PAUSE_S)
        return exchange

    async def close(self) -> None:
        await self._session.close()

    async def _exchange(self, exchange: Exchange, body: bytes) -> None:
        try:
            await self._talk(exchange, body)
        except aiohttp.ClientConnectorError as error:
            raise UnreachableError(str(error)) from None  # "Cannot connect to ..."
        except aiohttp.ServerDisconnectedError:
            raise OSError("the server closed the connection without an answer") from None
        except aiohttp.ClientPayloadError as error:
            raise OSError(f"the server closed the connection before the answer was complete: {error}") from None
        except aiohttp.ClientError as error:
            raise OSError(f"{type(error).__name__}: {error}") from None

    async def _talk(self, exchange: Exchange, body: bytes) -> None:
        call = exchange.call
        headers = {"x-request-id": call.request_id} | ({"x-session-id": call.session} if call.session else {})
        async with self._session.post(
            self._url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=exchange
        ) as response:
            exchange.refused = response.status != 200
            self._take(exchange, _head(response))
            await self._read(response.content, exchange)

    async def _read(self, content: aiohttp.StreamReader, exchange: Exchange) -> None:
        """Reads to the end; what follows [DONE] has ``DRAIN_S``, so that the connection can be used again."""
        while data := await content.readany():
            self._take(exchange, data)
            if DONE_LINE in b"\n" + data:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_S):
                        while data := await content.readany():
                            self._take(exchange, data)
                return

    def _take(self, exchange: Exchange, data: bytes) -> None:
        now = time.time_ns()
        exchange.reads.append((now, TIMESPEC.pack(now // 1_000_000_000, now % 1_000_000_000), data))
        exchange.held += len(data)
        self.reads += 1
        if exchange.held > SPILL_BYTES:
            self.spool.put(exchange)

    async def _opened_one(self, session: aiohttp.ClientSession, context: Any, params: Any) -> None:
        self.opened += 1
        await _stamp_sent(session, context, params)


async def _stamp_sent(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    if isinstance(context.trace_request_ctx, Exchange):
        context.trace_request_ctx.sent_ns = time.time_ns()


def _head(response: aiohttp.ClientResponse) -> bytes:
    lines = [f"HTTP/1.1 {response.status} {response.reason or ''}"]
    lines += [f"{k}: {v}" for k, v in response.headers.items() if k.lower() not in FRAMING_HEADERS]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
