"""What the server answers: chat and text completions, whole or as server-sent events.

Owns the shapes and their encoding; one ``ResponseFormat`` serves one request. Timing, tokens and text come from
``generate.py``.
"""

from __future__ import annotations

import time
from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length"]
DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(prompt, completion, prompt + completion, PromptDetails(cached))


# In a chunk: the usage so far, null when it comes at the end, absent when it was not asked for.
ChunkUsage = Usage | msgspec.UnsetType | None


class Delta(msgspec.Struct, omit_defaults=True):
    content: str
    role: str | None = None


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: None = None


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: None = None


class AnswerMessage(msgspec.Struct):
    role: str
    content: str


class AnswerChoice(msgspec.Struct):
    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class Envelope(msgspec.Struct, kw_only=True):
    """Top level of every answer and chunk."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice] | list[TextChoice] | list[AnswerChoice]
    usage: ChunkUsage = msgspec.UNSET


class ResponseFormat(Protocol):
    """Encodes the answer to request ``rid``. ``finish`` is None in all but the last chunk."""

    rid: str

    def chunk(self, text: str, finish: FinishReason | None, usage: ChunkUsage) -> bytes:
        """One server-sent event."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event without choices that ends a stream."""

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""


class ChatFormat:
    def __init__(self, rid: str, model: str) -> None:
        self.rid, self._model, self._created = rid, model, int(time.time())
        self._role: str | None = "assistant"  # goes with the first delta

    def chunk(self, text: str, finish: FinishReason | None, usage: ChunkUsage) -> bytes:
        choice = ChunkChoice(0, Delta(text, self._role), finish)
        self._role = None
        return self._event([choice], usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> bytes:
        choices = [AnswerChoice(0, AnswerMessage("assistant", text), finish)]
        return _encoder.encode(
            Envelope(id=f"chatcmpl-{self.rid}", object="chat.completion", created=self._created, model=self._model,
                     choices=choices, usage=usage)
        )  # fmt: skip

    def _event(self, choices: list[ChunkChoice], usage: ChunkUsage) -> bytes:
        return sse(
            Envelope(id=f"chatcmpl-{self.rid}", object="chat.completion.chunk", created=self._created,
                     model=self._model, choices=choices, usage=usage)
        )  # fmt: skip


class TextFormat:
    def __init__(self, rid: str, model: str) -> None:
        self.rid, self._model, self._created = rid, model, int(time.time())

    def chunk(self, text: str, finish: FinishReason | None, usage: ChunkUsage) -> bytes:
        return sse(self._envelope([TextChoice(0, text, finish)], usage))

    def usage_chunk(self, usage: Usage) -> bytes:
        return sse(self._envelope([], usage))

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> bytes:
        return _encoder.encode(self._envelope([TextChoice(0, text, finish)], usage))

    def _envelope(self, choices: list[TextChoice], usage: ChunkUsage) -> Envelope:
        return Envelope(id=f"cmpl-{self.rid}", object="text_completion", created=self._created, model=self._model,
                        choices=choices, usage=usage)  # fmt: skip


def sse(envelope: Envelope) -> bytes:
    return b"data: " + _encoder.encode(envelope) + b"\n\n"
