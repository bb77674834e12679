"""The nouns of the engine: SamplingParams, Request, Batch, InFlight, StepContext.

Plain data without torch, shared by the frontend (through ``messages``), the scheduler and the runner.
Read next: ``parallel.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

UNKNOWN = -1  # in ``Request.tokens``: sampled by a step that still runs


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the tokens of one request are chosen. The frontend has checked every range.

    Attributes:
        min_tokens: before so many output tokens, none of ``stop_token_ids`` can be chosen.
        temperature: 0: greedy.
        top_k: 0: all tokens.
        min_p: least probability, relative to the most likely token's.
        presence_penalty, frequency_penalty: OpenAI's, over the output.
        repetition_penalty: Hugging Face's, over prompt and output; 1: off.
        logit_bias: added to the logits of single tokens.
        seed: with the position, all the randomness there is.
        stop_token_ids: end the request; the model's own are among them unless the client ignores them.
        logprobs: so many alternatives are reported beside each output token's logprob; None: no logprobs.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether sampling counts the tokens before, or a logprob comes with each token."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or self.logprobs is not None or self.prompt_logprobs is not None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token under the model (before any sampling option), and the most likely tokens there."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(eq=False)
class Request:
    """One request on its rank. ``tokens`` is prompt + output; a preempted request keeps it and recomputes."""

    rid: str
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    arrival: int  # order of arrival at this rank; preemption takes the latest first
    handoff: bool = False  # ends here with its first token; its blocks stay until another rank has read them

    num_computed: int = 0  # tokens whose KV is in the cache
    num_cached: int = 0  # prompt tokens that came from the prefix cache, at first admission
    blocks: list[list[int]] = field(default_factory=list)  # KV block ids in token order, of each kind of layer
    block_hashes: list[int] = field(default_factory=list)  # of the full blocks in `tokens` known so far
    num_published: int = 0  # leading blocks already offered to the prefix cache
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens[1:], as far as they are computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def prefilling(self) -> bool:
        """True while more than its newest token has yet to be computed."""
        return len(self.tokens) - self.num_computed > 1


@dataclass(frozen=True)
class ScheduledRequest:
    """``num_tokens`` tokens of ``request`` in this step, after its computed ones and ``offset`` more.

    The offset is not zero in the second half of a request that two-batch overlap cut in two.
    """

    request: Request
    num_tokens: int
    offset: int = 0

    @property
    def begin(self) -> int:
        """Position of the first token."""
        return self.request.num_computed + self.offset

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.begin + self.num_tokens

    @property
    def samples(self) -> bool:
        """True when the step reaches the request's last known token, so that its logits give the next one."""
        return self.end == len(self.request.tokens)

    @property
    def scored(self) -> range:
        """Positions whose logits give a logprob of the prompt's next token, where the request asks for those."""
        request = self.request
        if request.sampling.prompt_logprobs is None:
            return range(0)
        known = len(request.prompt_logprobs)  # a preempted request computes some of them again
        return range(max(self.begin, known), max(self.begin, known, min(self.end, request.prompt_len - 1)))


@dataclass(frozen=True)
class Batch:
    """What one DP rank runs in one step: decoding requests first, then prefill chunks. May be empty."""

    decode: tuple[ScheduledRequest, ...] = ()
    prefill: tuple[ScheduledRequest, ...] = ()

    @property
    def scheduled(self) -> tuple[ScheduledRequest, ...]:
        return self.decode + self.prefill

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(s.num_tokens for s in self.prefill)

    @property
    def num_logit_rows(self) -> int:
        """Rows of logits that the step must give."""
        return sum(s.samples + len(s.scored) for s in self.scheduled)


@dataclass(frozen=True)
class InFlight:
    """A launched step.

    Attributes:
        sampling: where in ``request.tokens`` each sampled token belongs, in batch order.
        computed: of each scheduled request, ``num_computed`` once this step is over; later ones may be under way.
    """

    batch: Batch
    sampling: tuple[tuple[Request, int], ...]
    computed: tuple[int, ...]


@dataclass(frozen=True)
class StepContext:
    """What all ranks agreed on before a step.

    Attributes:
        step: forward passes since start, equal on every rank.
        dp_tokens: tokens of each DP rank in this step; zeros are ranks that only take part.
        dp_logit_rows: rows of logits that each DP rank needs from this step, for tokens and for logprobs of prompts.
        first_half: tokens of each DP rank in the first half of a step with two-batch overlap; None: no overlap.
        is_extend: True when any rank prefills (SGLang's ``is_extend_in_batch``).
    """

    step: int
    dp_tokens: tuple[int, ...]
    dp_logit_rows: tuple[int, ...]
    is_extend: bool
    first_half: tuple[int, ...] | None = None
