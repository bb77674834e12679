"""Every key with its default and what it means, for ``--help``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from toolkit.config.deploy import PoolConfig
from toolkit.config.engine import AttentionDpConfig
from toolkit.config.experiment import GROUPS


def help_text() -> str:
    """Every key with its default and help, for ``--help``."""
    lines: list[str] = []
    for group, cls in GROUPS.items():
        lines.append(f"\n{group}: {(cls.__doc__ or '').splitlines()[0]}")
        lines += _help_lines(cls, group)
    return "\n".join(lines)


def _help_lines(cls: type, prefix: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        default = getattr(cls(), f.name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        if dataclasses.is_dataclass(default):
            shown = "..."
        yield f"  {prefix}.{f.name}={shown if shown != '' else chr(39) * 2}  {f.metadata['help']}"
        if isinstance(default, (PoolConfig, AttentionDpConfig)):
            yield from _help_lines(type(default), f"{prefix}.{f.name}")
