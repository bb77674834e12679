"""``opt``: a config key with its default and its help text."""

from __future__ import annotations

import dataclasses
from typing import Any


def opt(default: Any, help: str) -> Any:
    """A dataclass field with its help text. Lists and dicts are copied for each instance."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})
