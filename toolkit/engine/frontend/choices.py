"""The choices of one request as they grow: outputs of a rank -> text, logprobs, counts.

With ``n`` > 1 the first choice goes ahead until its first token, when its prompt's blocks are in the prefix cache of
its rank; then the others start there and find them. Each draws with a seed of its own. Knows neither HTTP nor JSON.
Read next: ``detokenize.py``, ``flight.py``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.detokenize import Detokenizer
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.flight import Flight, Mailbox
from toolkit.engine.frontend.logprobs import Scored
from toolkit.engine.frontend.metrics import Metrics
from toolkit.engine.frontend.protocol import MAX_SEED
from toolkit.engine.frontend.tokenizer import Tokenizer
from toolkit.engine.messages import Output

FinishReason = Literal["stop", "length"]


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens, as OpenAI's API counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(prompt, completion, prompt + completion, PromptDetails(cached))


@dataclass(frozen=True)
class Piece:
    """What one step added to choice ``index``. ``scored`` is None where no logprobs were asked for."""

    index: int
    text: str
    finish: FinishReason | None
    scored: list[Scored] | None


@dataclass(frozen=True)
class Echo:
    """The prompt in front of every choice: its text, and its tokens with the character where each begins."""

    text: str
    tokens: list[tuple[int, int]]
    alone: bool  # the prompt is only scored, no output is shown

    @classmethod
    def of(cls, text: str | None, tokens: list[int], tokenizer: Tokenizer, alone: bool) -> Echo:
        """``text``: as the client wrote it; None: the prompt came as tokens."""
        stream, shown, located = tokenizer.stream(), "", []
        for token in tokens:
            located.append((token, len(shown)))
            shown += stream.push(token)
        return cls(shown + stream.flush() if text is None else text, located, alone)


class Choice:
    """One choice."""

    def __init__(self, index: int, detokenizer: Detokenizer, sampling: SamplingParams, echo: Echo | None, m: Metrics):
        self._index, self._detokenizer, self._sampling, self._metrics = index, detokenizer, sampling, m
        self._echo, self._alone = echo, echo is not None and echo.alone
        self._chars_before = 0 if echo is None else len(echo.text)
        self._started = self._last = time.perf_counter()

    @property
    def num_tokens(self) -> int:
        return self._detokenizer.num_tokens

    def take(self, output: Output, prompt_scores: list[Scored]) -> Piece:
        """What ``output`` adds. ``ApiError`` when the rank could not go on."""
        if output.finish in ("error", "abort"):
            reason = output.error or "the request was aborted by its rank"
            raise ApiError(500, reason, code="engine_error")
        self._observe(len(output.token_ids))
        scored: list[Scored] = []
        text = ""
        if self._echo is not None:
            text, scored, self._echo = self._echo.text, list(prompt_scores), None
        if not self._alone:
            text += self._push(output, scored)
        finish: FinishReason | None = None
        if output.finish is not None:
            finish = "stop" if output.finish == "stop" else "length"
        if self._detokenizer.stopped:
            finish = "stop"
        if finish is not None:
            self._metrics.e2e.observe(self._last - self._started)
        return Piece(self._index, text, finish, None if self._sampling.logprobs is None else scored)

    def _push(self, output: Output, scored: list[Scored]) -> str:
        """The text of the new tokens; their scores go to ``scored``."""
        detokenizer, tokens = self._detokenizer, output.token_ids
        # The end token is counted and has no text, even where the tokenizer does not call it special.
        ended = output.finish == "stop" and bool(tokens) and tokens[-1] in self._sampling.stop_token_ids
        text = ""
        for i, token in enumerate(tokens):
            if detokenizer.stopped:
                break
            if output.logprobs:
                scored.append(Scored(token, self._chars_before + detokenizer.num_chars, output.logprobs[i]))
            if not (ended and i == len(tokens) - 1):
                text += detokenizer.push(token)
        if output.finish is not None and not detokenizer.stopped:
            text += detokenizer.finish(silent_tokens=int(ended))
        return text

    def _observe(self, num_tokens: int) -> None:
        now = time.perf_counter()
        if num_tokens and not self.num_tokens:
            self._metrics.ttft.observe(now - self._started)
        else:
            for _ in range(num_tokens):
                self._metrics.itl.observe((now - self._last) / num_tokens)
        self._last = now


class Choices:
    """All choices of one request.

    Args:
        rid: of the first choice; the others' are made of it.
        flight: takes the requests; what comes of them is put into ``mailbox``.
        detokenizer: makes one for each choice.
        echo: the prompt, where the answer repeats it.
    """

    def __init__(
        self, rid: str, flight: Flight, mailbox: Mailbox, prompt: list[int], sampling: SamplingParams, num: int,
        detokenizer: Callable[[], Detokenizer], echo: Echo | None, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._rid, self._flight, self._mailbox = rid, flight, mailbox
        self._prompt, self._sampling, self._num = prompt, sampling, num
        self._detokenizer, self._echo, self._metrics = detokenizer, echo, metrics
        self._open: dict[str, Choice] = {}
        self._all: list[Choice] = []
        self._cached = 0

    @property
    def usage(self) -> Usage:
        """So far. The prompt counts once; ``cached_tokens`` are those of the first choice."""
        return Usage.of(len(self._prompt), sum(choice.num_tokens for choice in self._all), self._cached)

    @property
    def headers(self) -> dict[str, str]:
        """Who answers: known from the first piece on."""
        return {"x-request-id": self._rid, "x-dp-rank": str(self._flight.label)}

    @property
    def ended(self) -> bool:
        return bool(self._all) and not self._open

    @property
    def waiting(self) -> bool:
        """Whether the next piece is here already. Never of several choices: what waits may be of one that has ended."""
        return self._num == 1 and bool(self._open) and self._mailbox.waiting

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the choices say, in the order in which it comes; ends when all have ended."""
        self._start(self._sampling)
        prompt_scores: list[Scored] = []
        while self._open:
            output = await self._mailbox.next()
            choice = self._open.get(output.rid)
            if choice is None:
                continue  # was on its way when a stop string ended the choice
            if choice is self._all[0]:
                self._cached = max(self._cached, output.cached_tokens)
            if self._echo is not None and self._sampling.prompt_logprobs is not None and not prompt_scores:
                figures = [None, *output.prompt_logprobs]
                prompt_scores = [Scored(token, at, f) for (token, at), f in zip(self._echo.tokens, figures)]
            piece = choice.take(output, prompt_scores)
            self._start_others()
            if piece.finish is not None:
                del self._open[output.rid]
                self._flight.abort(output.rid)
            yield piece

    async def whole(self) -> list[Piece]:
        """The whole of each choice, in the order of their indexes."""
        parts: list[list[Piece]] = [[] for _ in range(self._num)]
        async for piece in self.pieces():
            parts[piece.index].append(piece)
        return [_join(pieces) for pieces in parts]

    def _start_others(self) -> None:
        for index in range(len(self._all), self._num):
            # The prompt is scored once, by the first choice.
            seed = (self._sampling.seed + index) % (MAX_SEED + 1)
            self._start(msgspec.structs.replace(self._sampling, seed=seed, prompt_logprobs=None))

    def _start(self, sampling: SamplingParams) -> None:
        index = len(self._all)
        rid = f"{self._rid}-{index}" if index else self._rid
        choice = Choice(index, self._detokenizer(), sampling, self._echo, self._metrics)
        self._all.append(choice)
        self._open[rid] = choice
        self._flight.send(rid, sampling)


def _join(pieces: list[Piece]) -> Piece:
    last = pieces[-1]
    scored = None if last.scored is None else [entry for piece in pieces for entry in piece.scored or ()]
    return Piece(last.index, "".join(piece.text for piece in pieces), last.finish, scored)
