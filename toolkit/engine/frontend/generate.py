"""The request line: POST -> parse -> tokenize -> ``router.pick`` -> rank -> detokenize -> answer.

Owns the two completion endpoints, streamed and whole. Every output of a step is one write to the client.
A client that goes away cancels its handler, and leaving ``RankClient.generate`` aborts the request on its rank.
Read next: ``protocol.py`` (what is accepted), ``ranks.py`` (the wire).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import time
import uuid

import msgspec
from aiohttp import web

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.detokenize import Detokenizer
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.metrics import Metrics
from toolkit.engine.frontend.protocol import (
    ChatRequest,
    Common,
    CompletionRequest,
    Limits,
    parse,
    sampling_params,
)
from toolkit.engine.frontend.ranks import Flight, RankClient
from toolkit.engine.frontend.responses import (
    DONE,
    ChatFormat,
    ChunkUsage,
    FinishReason,
    ResponseFormat,
    TextFormat,
    Usage,
)
from toolkit.engine.frontend.router import RouterPolicy
from toolkit.engine.frontend.tokenizer import Tokenizer
from toolkit.engine.messages import Output

log = logging.getLogger(__name__)

# Text longer than this is tokenized beside the event loop: it takes longer than a step of the engine.
_LONG_TEXT = 20_000


class Answer:
    """One request's output as it grows: text and counts."""

    def __init__(self, prompt_len: int, detokenizer: Detokenizer, stop_token_ids: tuple[int, ...], metrics: Metrics):
        self._prompt_len, self._detokenizer, self._stop_token_ids = prompt_len, detokenizer, stop_token_ids
        self._metrics = metrics
        self._cached = 0
        self._started = self._last = time.perf_counter()

    @property
    def usage(self) -> Usage:
        return Usage.of(self._prompt_len, self._detokenizer.num_tokens, self._cached)

    def take(self, output: Output) -> tuple[str, FinishReason | None]:
        """The text that ``output`` adds, and why it is the last. ``ApiError`` when the rank could not go on."""
        if output.finish in ("error", "abort"):
            reason = output.error or "the request was aborted by its rank"
            raise ApiError(500, reason, code="engine_error")
        self._observe(len(output.token_ids))
        self._cached = max(self._cached, output.cached_tokens)
        tokens = output.token_ids
        # The end token is counted and has no text, even where the tokenizer does not call it special.
        ended = output.finish == "stop" and bool(tokens) and tokens[-1] in self._stop_token_ids
        text = self._detokenizer.push(tokens[:-1] if ended else tokens)
        finish: FinishReason | None = None
        if output.finish is not None and not self._detokenizer.stopped:
            text += self._detokenizer.finish(silent_tokens=int(ended))
            finish = "stop" if output.finish == "stop" else "length"
        if self._detokenizer.stopped:
            finish = "stop"
        if finish is not None:
            self._metrics.e2e.observe(self._last - self._started)
        return text, finish

    def _observe(self, num_tokens: int) -> None:
        now = time.perf_counter()
        if num_tokens and not self._detokenizer.num_tokens:
            self._metrics.ttft.observe(now - self._started)
        else:
            for _ in range(num_tokens):
                self._metrics.itl.observe((now - self._last) / num_tokens)
        self._last = now


class Generator:
    """The completion endpoints of a server that is ready.

    Args:
        max_open: requests held at a time; more are answered 503.
        seed: where the seeds of requests that bring none come from.
    """

    def __init__(
        self,
        model_name: str,
        tokenizer: Tokenizer,
        limits: Limits,
        ranks: RankClient,
        router: RouterPolicy,
        metrics: Metrics,
        max_open: int,
        seed: int,
    ) -> None:
        self._model_name, self._tokenizer, self._limits = model_name, tokenizer, limits
        self._ranks, self._router, self._metrics = ranks, router, metrics
        self._max_open, self._seed = max_open, seed
        self._count = itertools.count()

    async def chat(self, http: web.Request) -> web.StreamResponse:
        request = parse(await http.read(), ChatRequest)
        self._admit(request)
        messages = [message.template_fields() for message in request.messages]
        size = sum(len(message["content"]) for message in messages)
        try:
            if size > _LONG_TEXT:
                prompt = await asyncio.to_thread(self._tokenizer.encode_chat, messages)
            else:
                prompt = self._tokenizer.encode_chat(messages)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        return await self._answer(http, request, prompt, ChatFormat(uuid.uuid4().hex, self._model_name))

    async def completions(self, http: web.Request) -> web.StreamResponse:
        request = parse(await http.read(), CompletionRequest)
        self._admit(request)
        prompt = request.single_prompt()
        if isinstance(prompt, str):
            if len(prompt) > _LONG_TEXT:
                prompt = await asyncio.to_thread(self._tokenizer.encode, prompt)
            else:
                prompt = self._tokenizer.encode(prompt)
        return await self._answer(http, request, prompt, TextFormat(uuid.uuid4().hex, self._model_name))

    def _admit(self, request: Common) -> None:
        if request.model not in (None, self._model_name):
            raise ApiError(
                404, f"model={request.model} is not served here: use {self._model_name}", param="model",
                code="model_not_found",
            )  # fmt: skip
        if self._ranks.failure:
            raise ApiError(503, self._ranks.failure, code="failed")
        if self._ranks.num_open >= self._max_open:
            raise ApiError(
                503, f"{self._ranks.num_open} requests are open, engine.max_queued_requests={self._max_open}: "
                "try later, or raise it", code="overloaded", retry_after_s=1,
            )  # fmt: skip

    def _request_seed(self, request: Common) -> int:
        """A seed for this request alone: the same for the n-th request of every start."""
        if request.temperature == 0:
            return 0
        text = f"{self._seed}:{next(self._count)}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    async def _answer(
        self, http: web.Request, request: Common, prompt: list[int], fmt: ResponseFormat
    ) -> web.StreamResponse:
        sampling = sampling_params(
            request, prompt, self._limits, self._tokenizer.stop_token_ids, self._request_seed(request)
        )
        self._admit(request)  # again: others may have come while a long prompt was tokenized
        answer = self._new_answer(request, prompt, sampling)
        with self._ranks.generate(fmt.rid, self._router.pick(prompt), prompt, sampling) as flight:
            if request.stream:
                return await self._stream(http, request, flight, answer, fmt)
            text, finish = "", None
            while finish is None:
                piece, finish = answer.take(await flight.next())
                text += piece
        return web.Response(
            body=fmt.whole(text, finish, answer.usage),
            content_type="application/json",
            headers=_headers(flight),
        )

    def _new_answer(self, request: Common, prompt: list[int], sampling: SamplingParams) -> Answer:
        detokenizer = Detokenizer(self._tokenizer.stream(), request.stop_strings)
        return Answer(len(prompt), detokenizer, sampling.stop_token_ids, self._metrics)

    async def _stream(
        self, http: web.Request, request: Common, flight: Flight, answer: Answer, fmt: ResponseFormat
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **_headers(flight),
            }
        )
        try:
            await self._write_events(http, response, request, flight, answer, fmt)
        except ConnectionResetError:
            return response  # the client went away between two writes
        except Exception as error:
            if not response.prepared:
                raise
            # The status has gone out: an error event, and no [DONE], tell the client.
            if not isinstance(error, ApiError):
                log.exception("request %s failed", flight.rid)
                error = ApiError(500, f"internal error: {type(error).__name__}")
            with contextlib.suppress(ConnectionResetError):
                await response.write(b"data: " + error.body() + b"\n\n")
        return response

    async def _write_events(
        self,
        http: web.Request,
        response: web.StreamResponse,
        request: Common,
        flight: Flight,
        answer: Answer,
        fmt: ResponseFormat,
    ) -> None:
        options = request.usage_options
        usage: ChunkUsage = None if options.include_usage else msgspec.UNSET
        finish = None
        while finish is None:
            piece, finish = answer.take(await flight.next())
            if not response.prepared:  # only now: a request that fails before its first token gets a status
                await response.prepare(http)
            if options.continuous_usage_stats:
                usage = answer.usage
            event = fmt.chunk(piece, finish, usage)
            if finish is not None:
                event += (fmt.usage_chunk(answer.usage) if options.include_usage else b"") + DONE
            await response.write(event)


def _headers(flight: Flight) -> dict[str, str]:
    return {"x-request-id": flight.rid, "x-dp-rank": str(flight.dp_rank)}
