"""How a file of a run folder is written: to a temporary file that is renamed, so that nobody ever reads half of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal


def write_json(path: Path, value: Any) -> None:
    with replacing(path, "w") as out:
        json.dump(value, out, indent=2)
        out.write("\n")


@contextlib.contextmanager
def replacing(path: Path, mode: Literal["w", "wb"]) -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` that takes its place when the block ends without an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open(mode) as out:
            yield out
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
