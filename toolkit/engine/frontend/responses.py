"""What the server answers: chat and text completions, whole or as server-sent events.

Owns the shapes, which also are the schema in /openapi.json, and their encoding; one ``ResponseFormat`` serves one
request. Timing, tokens and text come from ``generate.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal, Protocol

import msgspec

from toolkit.engine.frontend.choices import FinishReason, Piece, Usage
from toolkit.engine.frontend.logprobs import ChatLogprobs, TextLogprobs, chat_logprobs, text_logprobs
from toolkit.engine.frontend.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


# In a chunk: the usage so far, null when it comes at the end, absent when it was not asked for.
ChunkUsage = Usage | msgspec.UnsetType | None


class Delta(msgspec.Struct, omit_defaults=True):
    content: str
    role: Literal["assistant"] | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class ChatMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class ChatAnswer(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChunkUsage = msgspec.UNSET


class TextAnswer(msgspec.Struct, kw_only=True):
    """Answer and chunk alike."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: ChunkUsage = msgspec.UNSET


class ResponseFormat(Protocol):
    """Encodes the answer to request ``rid``."""

    rid: str

    def chunk(self, piece: Piece, usage: ChunkUsage) -> bytes:
        """One server-sent event."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event without choices that ends a stream."""

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> bytes:
        """The body of an answer that is not streamed: one piece a choice."""


class ChatFormat:
    def __init__(self, rid: str, model: str, tokenizer: Tokenizer) -> None:
        self.rid, self._model, self._created, self._tokenizer = rid, model, int(time.time()), tokenizer
        self._introduced: set[int] = set()  # choices whose first delta, which names the role, has gone

    def chunk(self, piece: Piece, usage: ChunkUsage) -> bytes:
        role: Literal["assistant"] | None = None if piece.index in self._introduced else "assistant"
        self._introduced.add(piece.index)
        choice = ChatChunkChoice(piece.index, Delta(piece.text, role), piece.finish, self._logprobs(piece))
        return self._event([choice], usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> bytes:
        choices = [ChatChoice(p.index, ChatMessage(p.text), p.finish, self._logprobs(p)) for p in pieces]
        return _encoder.encode(
            ChatAnswer(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)
        )

    @property
    def _id(self) -> str:
        return f"chatcmpl-{self.rid}"

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if piece.scored is None else chat_logprobs(piece.scored, self._tokenizer)

    def _event(self, choices: list[ChatChunkChoice], usage: ChunkUsage) -> bytes:
        return _sse(ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage))


class TextFormat:
    def __init__(self, rid: str, model: str, tokenizer: Tokenizer) -> None:
        self.rid, self._model, self._created, self._tokenizer = rid, model, int(time.time()), tokenizer

    def chunk(self, piece: Piece, usage: ChunkUsage) -> bytes:
        return _sse(self._answer([piece], usage))

    def usage_chunk(self, usage: Usage) -> bytes:
        return _sse(self._answer([], usage))

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> bytes:
        return _encoder.encode(self._answer(pieces, usage))

    def _answer(self, pieces: Iterable[Piece], usage: ChunkUsage) -> TextAnswer:
        choices = [TextChoice(p.index, p.text, p.finish, self._logprobs(p)) for p in pieces]
        rid = f"cmpl-{self.rid}"
        return TextAnswer(id=rid, created=self._created, model=self._model, choices=choices, usage=usage)

    def _logprobs(self, piece: Piece) -> TextLogprobs | None:
        return None if piece.scored is None else text_logprobs(piece.scored, self._tokenizer)


def _sse(event: ChatChunk | TextAnswer) -> bytes:
    return b"data: " + _encoder.encode(event) + b"\n\n"
