"""Plain dicts and config dataclasses, and what is said of a key or a value that cannot be right.

Does not know where a dict comes from. Read next: ``compose.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from typing import Any, Literal

import msgspec

from toolkit.config.experiment import GROUPS

C = typing.TypeVar("C")


def from_mapping(values: dict[str, Any], cls: type[C]) -> C:
    """A plain dict -> the config dataclass ``cls``.

    Raises:
        ValueError: unknown key (with the closest known one), or a value of a wrong type.
    """
    refuse_unknown(values, cls, "")
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), values)) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """A config dataclass -> plain dict, the inverse of ``from_mapping``."""
    return dataclasses.asdict(config)


def explain_override(text: str) -> str | None:
    """Why the command-line override ``text`` (``group.key=value``) cannot be right, or None.

    Hydra's own message advises ``+group.key``, which would only move the mistake; this one names the key meant.
    """
    match = re.match(r"^\+{0,2}~?(\w+)\.(\w+)(?:[.=]|$)", text)
    if match is None or match[1] not in GROUPS:
        return None
    known = [f.name for f in dataclasses.fields(GROUPS[match[1]])]
    if match[2] in known:
        return None
    return f"{match[1]}.{match[2]} is not a config key{closest(match[2], known)}"


def closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def refuse_unknown(values: dict[str, Any], cls: type, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{prefix}{key} is not a config key{closest(key, list(hints))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            refuse_unknown(value, typing.cast(type, hints[key]), f"{prefix}{key}.")


def _explain(message: str, values: dict[str, Any]) -> str:
    """msgspec's message (``Expected `int`, got `str` - at `$.a.b```) with the field and its value in front."""
    what, _, where = message.partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    value: Any = values
    for part in re.findall(r"\w+", path):
        value = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else value
    return f"{path}={value!r}: {what}{_choices(path)}"


def _choices(path: str) -> str:
    """The values a key allows, when they are few."""
    group, _, name = path.partition(".")
    hint = typing.get_type_hints(GROUPS[group]).get(name) if group in GROUPS else None
    options = [
        arg
        for part in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
        for arg in (typing.get_args(part) if typing.get_origin(part) is Literal else [])
    ]
    return f"; use one of: {', '.join(map(str, options))}" if options else ""
