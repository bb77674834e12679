"""Logprobs in the answer: the shapes of chat and text completions, made of token ids, ranks' figures and offsets.

There is one entry for every token that ``usage`` counts, the end token and the tokens of a stop string included, and
with ``echo`` one for every token of the prompt. Knows neither HTTP nor streams. Read next: ``choices.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from toolkit.engine.core import TokenLogprobs
from toolkit.engine.frontend.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's "very unlikely"; JSON has no infinity


@dataclass(frozen=True)
class Scored:
    """A token with its figures (None: the prompt's first token) and the character of the text where it begins."""

    token: int
    offset: int
    figures: TokenLogprobs | None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """Parallel lists. ``top_logprobs`` holds the token itself too; each entry is null where none was asked for."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(entries: Sequence[Scored], tokenizer: Tokenizer) -> ChatLogprobs:
    content = []
    for entry in entries:
        figures = entry.figures
        assert figures is not None, "the prompt of a chat is not scored"
        raw = tokenizer.token_bytes(entry.token)
        top = []
        for token, logprob in zip(figures.top_ids, figures.top_logprobs):
            other = tokenizer.token_bytes(token)
            top.append(TopLogprob(_text(other), max(logprob, MIN_LOGPROB), list(other)))
        content.append(TokenLogprob(_text(raw), max(figures.logprob, MIN_LOGPROB), list(raw), top))
    return ChatLogprobs(content)


def text_logprobs(entries: Sequence[Scored], tokenizer: Tokenizer) -> TextLogprobs:
    tokens, own, tops = [], [], []
    for entry in entries:
        figures, token = entry.figures, _text(tokenizer.token_bytes(entry.token))
        tokens.append(token)
        own.append(None if figures is None else max(figures.logprob, MIN_LOGPROB))
        top: dict[str, float] | None = None
        if figures is not None and figures.top_ids:
            top = {}
            for i, logprob in zip(figures.top_ids, figures.top_logprobs):
                # Parts of characters look alike; the best of them stands for all.
                top.setdefault(_text(tokenizer.token_bytes(i)), max(logprob, MIN_LOGPROB))
            top.setdefault(token, max(figures.logprob, MIN_LOGPROB))
        tops.append(top)
    return TextLogprobs(tokens, own, tops, [entry.offset for entry in entries])


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
