"""The OpenAI dialect: request bodies, and what the events of a streamed answer say.

Owns which event carries tokens and how many. It knows neither sockets nor clocks: ``Answer`` is told when an event
was read. Read next: ``client.py``.

Tokens are the server's count. ``stream_options.continuous_usage_stats`` asks for it in every event, so that an event
of several tokens (speculative decoding, batched streaming) is known as such. A server that counts only at the end
gives the total; an event with text then counts as one token. A server that never counts: the same, and the total
is the number of events with text.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from toolkit.config.load import LoadConfig
from toolkit.loadgen.datasets import Sample
from toolkit.loadgen.sse import Event

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
OWN_FIELDS = {  # of a body: what says each
    "model": "model", "messages": "dataset", "prompt": "dataset", "max_tokens": "osl", "min_tokens": "ignore_eos",
    "ignore_eos": "ignore_eos", "temperature": "temperature", "seed": "seed", "stream": "", "stream_options": "",
}  # fmt: skip
ERROR_CHARS = 500  # of a server's error message that are kept


class AnswerError(ValueError):
    """The server answered, but not with a usable stream; the message goes into the request's row."""


def server_of(url: str) -> str:
    """The server's own address, whichever of its addresses the user has copied."""
    url = url.rstrip("/")
    for path in PATHS.values():
        url = url.removesuffix(path)
    return url.removesuffix("/v1")


def output_tokens(sample: Sample, load: LoadConfig) -> int:
    """The length of the answer to ask for."""
    return 1 if load.phase == "prefill" else sample.output_tokens or load.osl


def encode_body(sample: Sample, load: LoadConfig, model: str, seed: int) -> bytes:
    """The JSON body of one streamed request."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": output_tokens(sample, load),
        "temperature": load.temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if load.endpoint == "chat":
        body["messages"] = sample.as_messages()
    else:
        body["prompt"] = sample.as_prompt()
    if load.ignore_eos:
        # Not OpenAI's: left out when not wanted, strict servers refuse unknown fields.
        body["ignore_eos"] = True
        body["min_tokens"] = body["max_tokens"]
    return msgspec.json.encode(body | load.extra_body)


def continue_body(before: bytes, body: bytes) -> bytes:
    """``body`` with the messages of ``before`` in front of its own: the next turn of a conversation."""
    if not before:
        return body
    old, new = msgspec.json.decode(before), msgspec.json.decode(body)
    return msgspec.json.encode({**old, **new, "messages": [*old["messages"], *new["messages"]]})


def error_message(body: bytes) -> str:
    """The message inside an error body: OpenAI's ``error.message``, or ``message``, ``detail``, or the text itself."""
    text = body.decode(errors="replace").strip()
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    if isinstance(value, dict):
        inner = value.get("error", value)
        found = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
        text = str(found or text)
    return text[:ERROR_CHARS]


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    def output(self) -> tuple[str, bool, bool]:
        """Text of this event; whether anything in it is output (content, reasoning, a tool call); whether a user
        sees it (all of these but reasoning)."""
        delta = self.delta
        if delta is None:
            return self.text or "", bool(self.text), bool(self.text)
        thought, said = delta.reasoning_content or delta.reasoning or "", delta.content or self.text or ""
        visible = bool(said or delta.tool_calls)
        return thought + said, visible or bool(thought), visible


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Answer:
    """One streamed answer, event by event.

    ``chunk_at`` and ``chunk_tokens`` have one entry for each read that carried tokens: events that came in one read
    became known together, so they are one entry with their tokens added up.

    Attributes:
        completion_tokens: the server's count; -1: it gave none.
        first_visible_at: of the first event with something a user sees; NaN: none.
        finished: a finish reason or ``[DONE]`` was seen.
    """

    def __init__(self) -> None:
        self.chunk_at: list[float] = []
        self.chunk_tokens: list[int] = []
        self.texts: list[str] = []
        self.finish_reason = ""
        self.done = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.completion_tokens = -1
        self.first_visible_at = math.nan
        self.counted_each = False  # the server counts in every event
        self._seen = False  # an event with output has come
        self._attributed = 0

    @property
    def finished(self) -> bool:
        return self.done or bool(self.finish_reason)

    @property
    def output_tokens(self) -> int:
        return self.completion_tokens if self.completion_tokens >= 0 else sum(self.chunk_tokens)

    @property
    def token_source(self) -> str:
        """Where ``output_tokens`` comes from: ``usage`` (the server) or ``chunks`` (events with text)."""
        return "usage" if self.completion_tokens >= 0 else "chunks"

    def add(self, event: Event, at: float) -> int:
        """Takes in one event read at time ``at``; returns how many tokens it brought.

        Raises:
            AnswerError: the event is not JSON of the expected form, or reports an error.
        """
        if event.type == "error":
            raise AnswerError(f"the server ended the stream with an error: {error_message(event.data)}")
        data = event.data
        try:
            chunk = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if data.strip() == b"[DONE]":
                self.done = True
                return 0
            raise AnswerError(f"malformed event ({error}): {data[:200].decode(errors='replace')}") from None
        if chunk.error is not None:
            raise AnswerError(f"the server ended the stream with an error: {error_message(data)}")
        return self._take_chunk(chunk, at)

    def _take_chunk(self, chunk: _Chunk, at: float) -> int:
        usage = chunk.usage
        if usage is not None:
            self._take_usage(usage)
        if not chunk.choices:
            return 0  # the closing usage event: totals only
        choice = chunk.choices[0]
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
        text, output, visible = choice.output()
        if text:
            self.texts.append(text)
        if visible and self.first_visible_at != self.first_visible_at:  # NaN: none so far
            self.first_visible_at = at
        if output and not self._seen:
            return self._first(usage, at)
        if self.counted_each:
            # A token can be without text of its own (half a character, a special token): the server's count tells.
            # An event without a count: that of a later one will include its tokens.
            tokens = 0 if usage is None else usage.completion_tokens - self._attributed
        elif usage is not None and not self._seen:
            tokens = usage.completion_tokens - self._attributed
        else:
            tokens = 1 if output else 0
        return self._append(tokens, at) if tokens > 0 else 0

    def _take_usage(self, usage: _Usage) -> None:
        self.prompt_tokens = usage.prompt_tokens
        self.completion_tokens = usage.completion_tokens
        if (prompt := usage.prompt_tokens_details) is not None:
            self.cached_tokens = prompt.cached_tokens or 0
        if (completion := usage.completion_tokens_details) is not None:
            self.reasoning_tokens = completion.reasoning_tokens or 0

    def _first(self, usage: _Usage | None, at: float) -> int:
        """The first event with output. Tokens counted before it, without text, arrive with it."""
        self._seen, self.counted_each = True, usage is not None
        before, self._attributed = self._attributed, 0
        self.chunk_at, self.chunk_tokens = [], []
        return self._append(max(before, usage.completion_tokens) if usage is not None else before + 1, at)

    def _append(self, tokens: int, at: float) -> int:
        self._attributed += tokens
        if self.chunk_at and self.chunk_at[-1] == at:
            self.chunk_tokens[-1] += tokens
        else:
            self.chunk_at.append(at)
            self.chunk_tokens.append(tokens)
        return tokens
