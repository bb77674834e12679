"""What a client may send: the request structs, which also are the schema in /openapi.json, and how a body is parsed.

Fields fall in four classes: served (the structs below), ignored because they change nothing in the answer,
refused unless they have the value that means "off", and unknown, which are refused too: an option is never
dropped in silence. What needs the tokenized prompt is checked in ``sampling.py``; read it next.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from toolkit.engine.frontend.errors import ApiError, shown

MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1

# Accepted and without effect on the answer.
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)

# Known to OpenAI, SGLang or vLLM clients, not served: accepted only with a value that asks for nothing (or null).
OFF: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
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


Penalty = Annotated[float, Meta(ge=-2, le=2, description="over the output so far; 0: off")]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(min_length=1)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
# JSON's keys are strings.
LogitBias = dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Annotated[float, Meta(ge=-100, le=100)]]


class Common(msgspec.Struct, kw_only=True):
    """Fields of both endpoints. None is the same as absent, as in OpenAI's API."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0: greedy")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1, description="1: off")] | None = None
    top_k: Annotated[int, Meta(ge=-1, description="-1 or 0: off")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1, description="0: off")] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10, description="1: off")] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def usage_options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class ChatRequest(Common, kw_only=True):
    """A conversation to be continued by the assistant."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token's logprob; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common, kw_only=True):
    """A text to be continued."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, description="0 only with echo")] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

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


R = TypeVar("R", bound=msgspec.Struct)
C = TypeVar("C", bound=Common)


def parse(body: bytes, cls: type[C]) -> C:
    """The body of a completion's POST -> a checked request. Raises ``ApiError`` 400: field, value and rule."""
    fields = json_object(body)
    _refuse_unserved(fields, cls)
    served = cls.__struct_fields__
    request = convert({key: value for key, value in fields.items() if key in served}, cls)
    _check_pairs(request)
    return request


def json_object(body: bytes) -> dict[str, Any]:
    """Raises ``ApiError`` 400 when ``body`` is anything else."""
    try:
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {shown(fields)}, it must be a JSON object", code="invalid_json")
    return fields


def convert(fields: dict[str, Any], cls: type[R]) -> R:
    """Fields of JSON -> ``cls``. Raises ``ApiError`` 400 that names field, value and rule."""
    try:
        return msgspec.convert(fields, cls)
    except msgspec.ValidationError as error:
        raise _type_error(str(error), fields) from None


def _refuse_unserved(fields: dict[str, Any], cls: type[Common]) -> None:
    served = cls.__struct_fields__
    for key, value in fields.items():
        if key in served or key in IGNORED:
            continue
        if key not in OFF:
            close = difflib.get_close_matches(key, served, n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise ApiError(400, f"{key} is not a field of this request; {hint}", param=key, code="unknown_parameter")
        # True == 1 in Python, but tools=true is not tools=1.
        off = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in OFF[key])
        if value is not None and not off:
            way_out = f"leave it out or send {shown(OFF[key][0])}" if OFF[key] else "leave it out"
            raise ApiError(
                400, f"{key}={shown(value)} is not served here: {way_out}", param=key, code="unsupported_parameter"
            )


def _type_error(message: str, fields: dict[str, Any]) -> ApiError:
    """msgspec's message (``Expected `int`, got `str` - at `$.a[0].b```) with field and value in front."""
    what, _, where = message.partition(" - at ")
    where = where.removeprefix("`key` in ")
    param = where.strip("`").removeprefix("$").lstrip(".").removesuffix("[...]")
    value: Any = fields
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", param):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):
            break  # the path of a missing field ends in its parent
    if not param:
        return ApiError(400, what[:1].lower() + what[1:], code="invalid_type")
    return ApiError(400, f"{param}={shown(value)}: {what[:1].lower() + what[1:]}", param=param, code="invalid_value")


def _check_pairs(r: Common) -> None:
    """Rules between fields; those of one field are in its type."""

    def check(field: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ApiError(
                400, f"{field}={shown(getattr(r, field))} {rule}", param=field, code="invalid_value"
            )  # fmt: skip

    if r.stream_options is not None:
        check("stream_options", bool(r.stream), "needs stream=true: send it, or leave stream_options out")
    least = r.min_tokens or 0
    check("min_tokens", r.max_tokens is None or least <= r.max_tokens, f"is more than max_tokens={r.max_tokens}")
    if isinstance(r, ChatRequest):
        most = r.max_completion_tokens
        both = most is not None and r.max_tokens is not None and most != r.max_tokens
        check("max_tokens", not both, f"differs from max_completion_tokens={most}: send one of them")
        check("min_tokens", most is None or least <= most, f"is more than max_completion_tokens={most}")
        check("top_logprobs", r.top_logprobs is None or bool(r.logprobs), "needs logprobs=true: send it too")
    if isinstance(r, CompletionRequest):
        rule = "must be at least 1, or echo=true: leave it out for the default"
        check("max_tokens", r.max_tokens != 0 or bool(r.echo), rule)
