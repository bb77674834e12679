"""The nouns of the engine: SamplingParams, Request, Batch, StepContext.

Plain data without torch, shared by the frontend (through ``messages``), the scheduler and the runner.
Read next: ``parallel.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True):
    """How the tokens of one request are chosen. The frontend has checked every range."""

    max_tokens: int = 16
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Request:
    """One request on its rank. ``tokens`` is prompt + output; a preempted request keeps it and recomputes."""

    rid: str
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    arrival: int  # order of arrival at this rank; preemption takes the latest first

    num_computed: int = 0  # tokens whose KV is in the cache
    num_cached: int = 0  # prompt tokens that came from the prefix cache, at first admission
    blocks: list[list[int]] = field(default_factory=list)  # KV block ids in token order, of each kind of layer
    block_hashes: list[int] = field(default_factory=list)  # of the full blocks in `tokens` known so far
    num_published: int = 0  # leading blocks already offered to the prefix cache
    preemptions: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len


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
    def num_samples(self) -> int:
        return sum(s.samples for s in self.scheduled)


@dataclass(frozen=True)
class StepContext:
    """What all ranks agreed on before a step.

    Attributes:
        step: forward passes since start, equal on every rank.
        dp_tokens: tokens of each DP rank in this step; zeros are ranks that only take part.
        dp_samples: requests of each DP rank that get a token from this step.
        first_half: tokens of each DP rank in the first half of a step with two-batch overlap; None: no overlap.
        is_extend: True when any rank prefills (SGLang's ``is_extend_in_batch``).
    """

    step: int
    dp_tokens: tuple[int, ...]
    dp_samples: tuple[int, ...]
    is_extend: bool
    first_half: tuple[int, ...] | None = None
