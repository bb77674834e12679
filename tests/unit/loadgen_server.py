"""A real HTTP server, in a thread, that behaves as a test tells it to; and a way to send it calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from toolkit.loadgen.exchange import Call
from toolkit.loadgen.proof import Evidence
from toolkit.loadgen.wire import Point, Setup
from toolkit.loadgen.worker import Worker
from toolkit.records.requests import RequestRecord

Behaviour = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]

GAP_S = 0.005


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def delta(content: str | None = None, usage: int | None = None, finish: str | None = None, **other: Any) -> bytes:
    """A chat chunk; ``usage``: completion tokens so far."""
    chunk: dict[str, Any] = {"choices": [{"delta": {"content": content, **other}, "finish_reason": finish}]}
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return event(chunk)


ROLE = delta("", role="assistant")
DONE = b"data: [DONE]\n\n"


def stream(
    *parts: bytes, gap_s: float = GAP_S, headers: dict[str, str] | None = None, reset: bool = False
) -> Behaviour:
    """Writes each part on its own, ``gap_s`` apart; with ``reset`` the connection is torn down after the last."""

    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", **(headers or {})})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(gap_s)
        if reset:
            assert request.transport is not None
            request.transport.abort()
        return response

    return behave


def tokens(count: int | None = None, gap_s: float = GAP_S) -> Behaviour:
    """A well-behaved answer of ``count`` (else max_tokens) tokens, each counted in its chunk."""

    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        total = count or body["max_tokens"]
        words = [delta(f"w{i} ", usage=i + 1) for i in range(total)]
        return await stream(ROLE, *words, delta("", usage=total, finish="length"), DONE, gap_s=gap_s)(request, body)

    return behave


def reply(status: int, text: str, content_type: str = "application/json") -> Behaviour:
    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status, text=text, content_type=content_type)

    return behave


async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError("the client should have given up")


class ScriptedServer:
    """Answers the n-th completion request with the n-th behaviour; the last one repeats."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.behaviours: list[Behaviour] = [tokens()]
        self.health = web.HTTPOk
        self.models = ["demo"]
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.open_at_arrival: list[int] = []  # requests open when each one arrived, itself included
        self.connections: set[tuple[str, int]] = set()
        self.ports: list[int] = []  # of the client, one a request
        self.metrics = ""
        self.hooks: list[str] = []
        self.url = ""
        self._open = 0

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        behave = self.behaviours[min(len(self.bodies), len(self.behaviours) - 1)]
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(request.path)
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")
        self.connections.add(peer)
        self.ports.append(peer[1])
        self._open += 1
        self.open_at_arrival.append(self._open)
        try:
            return await behave(request, body)
        finally:
            self._open -= 1

    @property
    def open_now(self) -> int:
        return self._open

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics) if self.metrics else web.Response(status=404)

    async def _hook(self, request: web.Request) -> web.Response:
        self.hooks.append(request.path)
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        raise self.health(text='{"state": "loading"}')

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _serve(self, started: threading.Event, port: int) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/flush_cache", self._hook)
        app.router.add_post("/start_profile", self._hook)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await self._stop.wait()
        await runner.cleanup()

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[ScriptedServer]:
        started = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(started, port)), daemon=True)
        thread.start()
        assert started.wait(10), "the test's server did not start"
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(10)


def call(number: int, warmup: bool = False, expected: int = 0, **more: Any) -> Call:
    return Call(f"r{number}", f"p{number}", warmup, expected, 0, len(BODY), **more)


BODY = json.dumps({"model": "demo", "max_tokens": 3, "messages": [{"role": "user", "content": "hello"}]}).encode()


def setup(url: str, transport: str = "socket", timeout_s: float = 20.0, **more: Any) -> Setup:
    assert transport in ("socket", "aiohttp")
    return Setup(f"{url}/v1/chat/completions", transport, timeout_s, **more)  # type: ignore[arg-type]


@dataclass
class Result:
    """What a worker made of its calls."""

    records: list[RequestRecord]
    evidence: Evidence


async def measure(settings: Setup, calls: Sequence[Call], point: Point, bodies: bytes = BODY) -> Result:
    """Runs the calls as a worker process does; when cancelled, gives what there is."""
    async with Worker(settings) as worker:
        try:
            evidence = await worker.measure(point, list(calls), bodies)
        except asyncio.CancelledError:
            evidence = Evidence()
        return Result([record for record, _ in worker.rows(point, evidence)], evidence)


def closed_loop(concurrency: int) -> Point:
    return Point(0, concurrency, concurrency, False, "", "", "")


def fetch(
    url: str, count: int = 1, concurrency: int = 1, timeout_s: float = 20.0, transport: str = "socket"
) -> list[RequestRecord]:
    """Sends ``count`` calls with a real client and gives their rows, in the order they ended."""
    import uvloop

    calls = [call(number) for number in range(count)]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(setup(url, transport, timeout_s), calls, closed_loop(concurrency))).records
