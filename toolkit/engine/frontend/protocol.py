"""What a client may send: the request structs, and every check that needs no tokenizer.

Fields fall in four classes: served (the structs below), ignored because they change nothing in the answer,
refused unless they have the value that means "off", and unknown, which are refused too: an option is never
dropped in silence. Read next: ``generate.py``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.errors import ApiError, shown

MAX_STOP_STRINGS = 4
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

# Accepted and without effect on the answer.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)

# Known to OpenAI, SGLang or vLLM clients, not served: accepted only with a value that asks for nothing (or null).
_OFF: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_usage``: a last chunk with the usage. ``continuous_usage_stats``: the usage so far in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    type: Literal["text"] = "text"


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def template_fields(self) -> dict[str, str]:
        """What a chat template reads."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        fields = {"role": self.role, "content": content}
        return fields if self.name is None else {**fields, "name": self.name}


class Common(msgspec.Struct, kw_only=True):
    """Fields of both endpoints. None is the same as absent, as in OpenAI's API."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class ChatRequest(Common, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None


class CompletionRequest(Common, kw_only=True):
    prompt: str | list[str | int | list[int]]

    def single_prompt(self) -> str | list[int]:
        """The one prompt: text or token ids. Lists of one prompt are taken, longer ones are refused."""
        prompt: str | int | list[int] | list[str | int | list[int]] = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(
                    400, f"prompt holds {len(prompt)} prompts, one is served a request: send them one by one",
                    param="prompt",
                )  # fmt: skip
            prompt = prompt[0]
        if prompt == "":
            raise ApiError(400, "the prompt is empty: send at least one character", param="prompt")
        if isinstance(prompt, str):
            return prompt
        assert isinstance(prompt, list), prompt
        ids = [token for token in prompt if isinstance(token, int)]
        if len(ids) != len(prompt):
            raise ApiError(
                400, f"prompt={shown(prompt)} mixes text and token ids: send a string or a list of token ids",
                param="prompt",
            )  # fmt: skip
        return ids


R = TypeVar("R", bound=Common)


def parse(body: bytes, cls: type[R]) -> R:
    """The body of a POST -> a checked request. Raises ``ApiError`` 400 that names field, value and rule."""
    try:
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {shown(fields)}, it must be a JSON object", code="invalid_json")
    _refuse_unserved(fields, cls)
    try:
        request = msgspec.convert({key: value for key, value in fields.items() if key not in _OFF}, cls)
    except msgspec.ValidationError as error:
        raise _type_error(str(error), fields) from None
    _check_ranges(request)
    return request


def _refuse_unserved(fields: dict[str, Any], cls: type[Common]) -> None:
    served = {field.name for field in msgspec.structs.fields(cls)}
    for key, value in fields.items():
        if key in served or key in _IGNORED:
            continue
        if key not in _OFF:
            close = difflib.get_close_matches(key, served, n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise ApiError(400, f"{key} is not a field of this request; {hint}", param=key, code="unknown_parameter")
        # True == 1 in Python, but n=true is not n=1.
        off = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in _OFF[key])
        if value is not None and not off:
            way_out = f"leave it out or send {shown(_OFF[key][0])}" if _OFF[key] else "leave it out"
            raise ApiError(
                400, f"{key}={shown(value)} is not served here: {way_out}", param=key, code="unsupported_parameter"
            )


def _type_error(message: str, fields: dict[str, Any]) -> ApiError:
    """msgspec's message (``Expected `int`, got `str` - at `$.a[0].b```) with field and value in front."""
    what, _, where = message.partition(" - at `$")
    param = where.rstrip("`").lstrip(".")
    value: Any = fields
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", param):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):
            break  # the path of a missing field ends in its parent
    if not param:
        return ApiError(400, what[:1].lower() + what[1:], code="invalid_type")
    return ApiError(400, f"{param}={shown(value)}: {what[:1].lower() + what[1:]}", param=param, code="invalid_type")


def _check_ranges(request: Common) -> None:
    def check(field: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ApiError(
                400, f"{field}={shown(getattr(request, field))} {rule}", param=field, code="invalid_value"
            )  # fmt: skip

    r = request
    check("max_tokens", r.max_tokens is None or r.max_tokens >= 1, "must be at least 1: leave it out for the default")
    check("temperature", r.temperature is None or 0 <= r.temperature <= 2, "must be from 0 (greedy) to 2")
    check("top_p", r.top_p is None or 0 < r.top_p <= 1, "must be above 0 and at most 1 (1: off)")
    check("seed", r.seed is None or 0 <= r.seed < 2**63, "must be from 0 to 2^63 - 1")
    # With ignore_eos a request generates exactly max_tokens, so that any min_tokens holds; load generators send both.
    check("min_tokens", not r.min_tokens or bool(r.ignore_eos), "needs ignore_eos=true: send it, or leave it out")
    stop_ok = len(r.stop_strings) <= MAX_STOP_STRINGS and all(r.stop_strings)
    check("stop", stop_ok, f"must be at most {MAX_STOP_STRINGS} strings, none of them empty")
    if r.stream_options is not None and not r.stream:
        raise ApiError(400, "stream_options needs stream=true: send it, or leave stream_options out",
                       param="stream_options", code="invalid_value")  # fmt: skip
    if isinstance(r, ChatRequest):
        most = r.max_completion_tokens
        check("max_completion_tokens", most is None or most >= 1, "must be at least 1: leave it out for the default")
        both = most is not None and r.max_tokens is not None and most != r.max_tokens
        check("max_tokens", not both, f"differs from max_completion_tokens={most}: send one of them")
        check("messages", bool(r.messages), "must hold at least one message")


@dataclass(frozen=True)
class Limits:
    """What one request may take, from the ranks' ``Ready``: ``tokens`` of prompt + output, because of ``field``."""

    tokens: int
    field: str
    vocab_size: int


def sampling_params(
    request: Common, prompt: list[int], limits: Limits, stop_token_ids: tuple[int, ...], default_seed: int
) -> SamplingParams:
    """Checks the tokenized prompt against the model and gives what the ranks need to know."""
    if not prompt:
        raise ApiError(400, "the prompt is empty: send at least one token", param=_prompt_field(request))
    worst = min(prompt) if min(prompt) < 0 else max(prompt)
    if not 0 <= worst < limits.vocab_size:
        raise ApiError(
            400, f"prompt holds token id {worst}, the vocabulary has {limits.vocab_size}: "
            f"use ids from 0 to {limits.vocab_size - 1}", param=_prompt_field(request),
        )  # fmt: skip
    ignore_eos = bool(request.ignore_eos)
    temperature = 1.0 if request.temperature is None else request.temperature
    return SamplingParams(
        max_tokens=_max_tokens(request, len(prompt), limits),
        temperature=temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=default_seed if request.seed is None else request.seed,
        ignore_eos=ignore_eos,
        stop_token_ids=() if ignore_eos else stop_token_ids,
    )


def _max_tokens(request: Common, prompt_len: int, limits: Limits) -> int:
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
        return left if isinstance(request, ChatRequest) else min(COMPLETION_MAX_TOKENS, left)
    if asked > left:
        raise ApiError(
            400, f"{field}={asked} is more than the {left} tokens that {limits.field}={limits.tokens} leaves after a "
            f"prompt of {prompt_len}: use {field}<={left} or a shorter prompt",
            param=field, code="context_length_exceeded",
        )  # fmt: skip
    return asked


def _prompt_field(request: Common) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"
