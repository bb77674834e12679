"""Name -> factory tables, one per seam.

Owns nothing but the table: an unknown name lists the known ones. Knows nothing of what it holds; the
factories do their optional imports themselves, so that naming a backend never imports another.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Table of named factories for one config field.

    Args:
        field: the config key whose value selects an entry, e.g. ``engine.moe_a2a_backend``; it appears in errors.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: adds the decorated object as ``name``."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.field}: {name} registered twice"
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry called ``name``; ``ValueError`` that lists the known names when there is none."""
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(unknown(self.field, name, list(self._entries))) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def unknown(field: str, value: str, known: list[str]) -> str:
    """The sentence for a value that is not among ``known``, with the closest one suggested."""
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{field}={value} is not known, use one of: {', '.join(sorted(known))}{hint}"
