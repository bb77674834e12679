"""The request line: POST -> parse -> tokenize -> ``Serving.flight`` -> rank -> detokenize -> answer.

Owns the two completion endpoints, streamed and whole. What has come for a client goes out in one write.
A client that goes away cancels its handler, and leaving its flight aborts its requests on their rank.
Read next: ``protocol.py`` (what is accepted), ``choices.py`` (what becomes of tokens), ``flight.py`` (the workers).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import uuid

import msgspec
from aiohttp import web

from toolkit.engine.frontend.choices import Choices, Echo
from toolkit.engine.frontend.detokenize import Detokenizer
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.flight import Mailbox, Serving
from toolkit.engine.frontend.metrics import Metrics
from toolkit.engine.frontend.protocol import ChatRequest, Common, CompletionRequest, StreamOptions, parse
from toolkit.engine.frontend.responses import DONE, ChatFormat, ChunkUsage, ResponseFormat, TextFormat
from toolkit.engine.frontend.sampling import Limits, sampling_params
from toolkit.engine.frontend.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Text longer than this is tokenized beside the event loop: it takes longer than a step of the engine.
_LONG_TEXT = 20_000


class Generator:
    """The completion endpoints of a server that is ready.

    Args:
        max_open: requests held at a time.
        seed: where the seeds of requests that bring none come from.
        index, num: of the processes that answer beside each other.
    """

    def __init__(
        self,
        model_name: str,
        tokenizer: Tokenizer,
        limits: Limits,
        fleet: Serving,
        metrics: Metrics,
        max_open: int,
        seed: int,
        index: int = 0,
        num: int = 1,
    ) -> None:
        self._model_name, self._tokenizer, self._limits = model_name, tokenizer, limits
        self._fleet, self._metrics = fleet, metrics
        self._max_open, self._seed = max_open, seed
        self._count = itertools.count(index, num)

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
        fmt = ChatFormat(uuid.uuid4().hex, self._model_name, self._tokenizer)
        return await self._answer(http, request, prompt, fmt)

    async def completions(self, http: web.Request) -> web.StreamResponse:
        request = parse(await http.read(), CompletionRequest)
        self._admit(request)
        given = request.single_prompt()
        text = given if isinstance(given, str) else None
        if isinstance(given, list):
            prompt = given
        elif len(given) > _LONG_TEXT:
            prompt = await asyncio.to_thread(self._tokenizer.encode, given)
        else:
            prompt = self._tokenizer.encode(given)
        fmt = TextFormat(uuid.uuid4().hex, self._model_name, self._tokenizer)
        return await self._answer(http, request, prompt, fmt, text)

    def _admit(self, request: Common) -> None:
        if request.model not in (None, self._model_name):
            raise ApiError(
                404, f"model={request.model} is not served here: use {self._model_name}", param="model",
                code="model_not_found",
            )  # fmt: skip
        if request.num_choices > self._max_open:
            raise ApiError(
                400, f"n={request.num_choices} is more than engine.max_queued_requests={self._max_open}: ask for fewer "
                "choices", param="n", code="invalid_value",
            )  # fmt: skip
        self._fleet.admit(request.num_choices)

    def _request_seed(self, request: Common) -> int:
        """A seed for this request alone: the same for the n-th request of every start."""
        if request.temperature == 0:
            return 0
        text = f"{self._seed}:{next(self._count)}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    async def _answer(
        self,
        http: web.Request,
        request: ChatRequest | CompletionRequest,
        prompt: list[int],
        fmt: ResponseFormat,
        text: str | None = None,
    ) -> web.StreamResponse:
        eos = self._tokenizer.stop_token_ids
        sampling = sampling_params(request, prompt, self._limits, eos, self._request_seed(request))
        echo = None
        if isinstance(request, CompletionRequest) and request.echo:
            echo = Echo.of(text, prompt, self._tokenizer, alone=request.max_tokens == 0)
        mailbox = Mailbox()
        with self._fleet.flight(prompt, request.num_choices, mailbox) as flight:
            choices = Choices(
                fmt.rid, flight, mailbox, prompt, sampling, request.num_choices,
                lambda: Detokenizer(self._tokenizer.stream(), request.stop_strings, sampling.min_tokens),
                echo, self._metrics,
            )  # fmt: skip
            if request.stream:
                return await self._stream(http, request.usage_options, choices, fmt)
            body = fmt.whole(await choices.whole(), choices.usage)
            return web.Response(body=body, content_type="application/json", headers=choices.headers)

    async def _stream(
        self, http: web.Request, options: StreamOptions, choices: Choices, fmt: ResponseFormat
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        try:
            await _write_events(http, response, options, choices, fmt)
        except ConnectionResetError:
            return response  # the client went away between two writes
        except Exception as error:
            if not response.prepared:
                raise
            # The status has gone out: an error event, and no [DONE], tell the client.
            if not isinstance(error, ApiError):
                log.exception("request %s failed", fmt.rid)
                error = ApiError(500, f"internal error: {type(error).__name__}")
            with contextlib.suppress(ConnectionResetError):
                await response.write(b"data: " + error.body() + b"\n\n")
        return response


async def _write_events(
    http: web.Request, response: web.StreamResponse, options: StreamOptions, choices: Choices, fmt: ResponseFormat
) -> None:
    """One write for every output of the ranks, the end of the stream in the last one.

    A frontend that is behind finds several outputs: an event each all the same, but a single write.
    """
    usage: ChunkUsage = None if options.include_usage else msgspec.UNSET
    events = b""
    try:
        async for piece in choices.pieces():
            if not response.prepared:  # only now: a request that fails before its first token gets a status
                response.headers.update(choices.headers)
                await response.prepare(http)
            if options.continuous_usage_stats:
                usage = choices.usage
            events += fmt.chunk(piece, usage)
            if choices.ended:
                events += (fmt.usage_chunk(choices.usage) if options.include_usage else b"") + DONE
            if not choices.waiting:
                written, events = events, b""
                await response.write(written)
    except ApiError:
        if events:  # what was generated before it failed
            await response.write(events)
        raise
