"""From a parsed request and its tokenized prompt to ``SamplingParams``: every check that needs the model's limits.

Read next: ``generate.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.protocol import ChatRequest, Common, CompletionRequest

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True)
class Limits:
    """What one request may take, from the ranks' ``Ready``: ``tokens`` of prompt + output, because of ``field``."""

    tokens: int
    field: str
    vocab_size: int


def sampling_params(
    request: ChatRequest | CompletionRequest,
    prompt: list[int],
    limits: Limits,
    eos_token_ids: tuple[int, ...],
    default_seed: int,
) -> SamplingParams:
    """Checks the tokenized prompt against the model and gives what the ranks need to know.

    Raises:
        ApiError: 400, with field, value, rule and way out.
    """
    r = request
    field = _prompt_field(r)
    if not prompt:
        raise ApiError(400, "the prompt is empty: send at least one token", param=field)
    stop_token_ids = tuple(r.stop_token_ids or ())
    bias = {int(token): value for token, value in (r.logit_bias or {}).items()}
    for name, tokens in ((field, prompt), ("stop_token_ids", stop_token_ids), ("logit_bias", bias)):
        _check_vocabulary(name, tokens, limits.vocab_size)
    max_tokens = _max_tokens(r, len(prompt), limits)
    if (r.min_tokens or 0) > max_tokens:
        raise ApiError(
            400, f"min_tokens={r.min_tokens} is more than the {max_tokens} tokens that this request may generate: "
            "lower it, or raise max_tokens", param="min_tokens", code="invalid_value",
        )  # fmt: skip
    scored = isinstance(r, CompletionRequest) and r.echo
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=r.min_tokens or 0,
        temperature=1.0 if r.temperature is None else r.temperature,
        top_p=1.0 if r.top_p is None else r.top_p,
        top_k=max(0, r.top_k or 0),
        min_p=r.min_p or 0.0,
        presence_penalty=r.presence_penalty or 0.0,
        frequency_penalty=r.frequency_penalty or 0.0,
        repetition_penalty=1.0 if r.repetition_penalty is None else r.repetition_penalty,
        logit_bias=bias,
        seed=default_seed if r.seed is None else r.seed,
        stop_token_ids=stop_token_ids + (() if r.ignore_eos else eos_token_ids),
        logprobs=r.num_logprobs,
        prompt_logprobs=r.num_logprobs if scored else None,
    )


def _check_vocabulary(field: str, tokens: Iterable[int], vocab_size: int) -> None:
    outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ApiError(
            400, f"{field} holds token id {outside}, the vocabulary has {vocab_size}: use ids from 0 to "
            f"{vocab_size - 1}", param=field, code="invalid_value",
        )  # fmt: skip


def _max_tokens(request: Common, prompt_len: int, limits: Limits) -> int:
    """At least 1: a prompt that is only scored (echo, max_tokens=0) ends with a token that is not shown."""
    left = limits.tokens - prompt_len
    if left < 1:
        raise ApiError(
            400, f"the prompt has {prompt_len} tokens, {limits.field}={limits.tokens} holds prompt and output: "
            f"send at most {limits.tokens - 1} tokens", param=_prompt_field(request), code="context_length_exceeded",
        )  # fmt: skip
    asked, field = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        asked, field = request.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        default = left if isinstance(request, ChatRequest) else max(COMPLETION_MAX_TOKENS, request.min_tokens or 0)
        return min(default, left)
    if asked > left:
        raise ApiError(
            400, f"{field}={asked} is more than the {left} tokens that {limits.field}={limits.tokens} leaves after a "
            f"prompt of {prompt_len}: use {field}<={left} or a shorter prompt",
            param=field, code="context_length_exceeded",
        )  # fmt: skip
    return max(asked, 1)


def _prompt_field(request: Common) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"
