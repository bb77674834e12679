"""One request over aiohttp, and every timestamp of the load generator.

Each call that is sent ends in exactly one ``RequestRecord``, given to ``on_done``: answered, refused, broken in the
middle, timed out or cancelled. Durations are on ``time.perf_counter``; ``t_send`` places them in Unix time.

Where the stamps are taken: ``t_send`` when the connection is there and the request is about to be written (a new
connection's set-up is before it, inside ``-scheduled_s``); ``first_byte_s`` when the answer's headers are read; the
chunks right after the read that brought them, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import aiohttp

from toolkit.loadgen.openai_api import ERROR_CHARS, Answer, AnswerError, error_message
from toolkit.loadgen.sse import SSEParser
from toolkit.records import RequestRecord

KEEPALIVE_S = 4.0  # below the 5 s after which uvicorn closes an idle connection: no race between the two
READ_BUFFER = 1 << 20  # aiohttp stops reading a socket at twice this; its 64 KiB would pause fast streams
ERROR_BODY = 1 << 16  # bytes of an error answer that are read
DRAIN_S = 1.0  # how long after [DONE] the end of the HTTP answer may take before the connection is given up
FAILED_FINISHES = ("abort", "error")


@dataclass(frozen=True)
class Call:
    """One request, ready to be written."""

    request_id: str
    prompt_id: str
    body: bytes
    point: int
    concurrency: int
    warmup: bool
    expected_output_tokens: int


class Client(Protocol):
    """Sends calls; the seam for other transports.

    Attributes:
        output_tokens: tokens received so far, all calls together.
    """

    output_tokens: int

    async def send(self, call: Call, due: float) -> None:
        """Sends ``call``, which was due at ``due`` (perf_counter), and returns when it has ended, well or not."""
        ...


@dataclass
class _Timeline:
    """Stamps of one request on perf_counter; NaN: did not happen."""

    sent: float
    first_byte: float = math.nan
    end: float = math.nan


class HttpClient:
    """``Client`` over an aiohttp session (``open_session``).

    Args:
        url: of the endpoint.
        on_done: gets the record of every call, also of a cancelled one.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        timeout_s: float,
        on_done: Callable[[RequestRecord], None],
    ) -> None:
        self.output_tokens = 0
        self._session = session
        self._url = url
        self._timeout_s = timeout_s
        self._on_done = on_done
        self._unix_minus_perf = time.time() - time.perf_counter()

    async def send(self, call: Call, due: float) -> None:
        record, answer = _new_record(call), Answer()
        times = _Timeline(sent=time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(call, record, times, answer)
        except TimeoutError:
            _fail(record, "timeout", f"no complete answer after timeout_s={self._timeout_s:g}")
        except asyncio.CancelledError:
            _fail(record, "cancelled", "the run was interrupted")
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            _fail(record, "error", _explain(error))
        finally:
            self._fill(record, times, answer, due)
            self._on_done(record)

    async def _exchange(self, call: Call, record: RequestRecord, times: _Timeline, answer: Answer) -> None:
        """Writes the request and reads its answer to the end. Raises on anything but a complete, well-formed one."""
        headers = {"x-request-id": call.request_id}
        async with self._session.post(
            self._url, data=call.body, headers=headers, allow_redirects=False, trace_request_ctx=times
        ) as response:
            times.first_byte = time.perf_counter()
            record.http_status = response.status
            record.dp_rank = _dp_rank(response.headers.get("x-dp-rank", ""))
            await _refuse_other_than_stream(response)
            await self._read(response.content, answer, times)
            if answer.finish_reason in FAILED_FINISHES:
                raise AnswerError(f"the server ended the answer with finish_reason={answer.finish_reason}")
            if not answer.finished:
                raise AnswerError("the stream ended without a finish reason or [DONE]")
            if not answer.finish_reason and not answer.output_tokens:
                raise AnswerError("the stream held no token")
            record.status, record.error = "ok", ""
            await _drain(response.content)

    async def _read(self, content: aiohttp.StreamReader, answer: Answer, times: _Timeline) -> None:
        parser = SSEParser()
        while not answer.done:
            data = await content.readany()
            times.end = time.perf_counter()
            for event in parser.feed(data) if data else parser.finish():
                self.output_tokens += answer.add(event, times.end)
            if not data:
                return

    def _fill(self, record: RequestRecord, times: _Timeline, answer: Answer, due: float) -> None:
        """What is known when the call has ended, however it ended."""
        ended = record.status == "ok"
        record.t_send = times.sent + self._unix_minus_perf
        record.scheduled_s = min(0.0, due - times.sent)
        record.first_byte_s = times.first_byte - times.sent
        record.end_s = (times.end if ended else time.perf_counter()) - times.sent
        record.chunk_s = [at - times.sent for at in answer.chunk_at]
        record.chunk_tokens = answer.chunk_tokens
        if answer.chunk_at:
            record.first_token_s, record.last_token_s = record.chunk_s[0], record.chunk_s[-1]
        record.prompt_tokens, record.cached_tokens = answer.prompt_tokens, answer.cached_tokens
        record.output_tokens = answer.output_tokens
        record.finish_reason = answer.finish_reason
        record.output_text = "".join(answer.texts)


@contextlib.asynccontextmanager
async def open_session(api_key: str = "") -> AsyncIterator[aiohttp.ClientSession]:
    """One session for a whole run: connections are kept and reused, as many as there are calls at a time.

    No limit of its own (aiohttp's default is 100 connections, beyond which calls would wait inside the client):
    the arrival decides how many calls are open.
    """
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_stamp_sent)
    trace.on_connection_reuseconn.append(_stamp_sent)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=None),
        timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=READ_BUFFER,
        trace_configs=[trace],
    ) as session:
        yield session


async def _stamp_sent(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    if isinstance(context.trace_request_ctx, _Timeline):
        context.trace_request_ctx.sent = time.perf_counter()


async def _refuse_other_than_stream(response: aiohttp.ClientResponse) -> None:
    """Raises ``AnswerError`` with what the server said when the answer is not a 200 with an event stream."""
    if response.status == 200 and response.content_type == "text/event-stream":
        return
    body = bytearray()
    while len(body) < ERROR_BODY and (data := await response.content.readany()):
        body += data
    message = error_message(bytes(body[:ERROR_BODY])) or response.reason or "empty answer"
    if response.status == 200:
        raise AnswerError(f"content type {response.content_type} instead of text/event-stream: {message}")
    raise AnswerError(f"HTTP {response.status}: {message}")


async def _drain(content: aiohttp.StreamReader) -> None:
    """Reads what follows [DONE], so that the connection can be used again; aiohttp closes it otherwise."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(DRAIN_S):
            while await content.readany():
                pass


def _new_record(call: Call) -> RequestRecord:
    """The row of a call of which nothing is known yet but that it was to be sent."""
    return RequestRecord(
        point=call.point,
        concurrency=call.concurrency,
        request_id=call.request_id,
        prompt_id=call.prompt_id,
        warmup=call.warmup,
        status="error",
        error="the load generator itself failed; see its log",
        http_status=0,
        t_send=math.nan,
        scheduled_s=0.0,
        first_byte_s=math.nan,
        first_token_s=math.nan,
        last_token_s=math.nan,
        end_s=math.nan,
        prompt_tokens=0,
        cached_tokens=0,
        output_tokens=0,
        expected_output_tokens=call.expected_output_tokens,
        finish_reason="",
        dp_rank=-1,
        chunk_s=[],
        chunk_tokens=[],
        output_text="",
    )


def _fail(record: RequestRecord, status: Literal["error", "timeout", "cancelled"], error: str) -> None:
    if record.status != "ok":  # what happens to the connection after a complete answer does not make it a failed one
        record.status, record.error = status, error[:ERROR_CHARS]


def _dp_rank(header: str) -> int:
    return int(header) if header.isascii() and header.isdigit() else -1


def _explain(error: Exception) -> str:
    if isinstance(error, AnswerError):
        return str(error)
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the connection broke in the middle of the answer: {error}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection without an answer"
    return f"{type(error).__name__}: {error}"
