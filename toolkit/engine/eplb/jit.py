"""numba where it is installed, plain Python where it is not: one source for both.

Functions under ``jit`` use only what both run alike: numpy arrays, scalars, loops. Without numba they give the same
placements, some hundred times slower. Knows nothing of experts.
What is compiled is kept for the next process, apart for every state of the sources: numba itself notices a change of a
function's own file, not of those that it calls into.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None


def jit(function: F) -> F:
    """Compiles ``function`` on its first call (kept on disk for the next process), if numba is there."""
    if not COMPILED:
        return function
    import numba

    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before or _folder()
    try:  # the folder is chosen where a function is declared
        compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled


@cache
def _folder() -> str:
    """Where compiled functions of these sources are kept; empty where this folder cannot be written: numba chooses."""
    here = Path(__file__).parent
    if not os.access(here, os.W_OK):
        return ""
    sources = [file.read_bytes() for file in sorted(here.glob("*.py"))]
    digest = hashlib.sha256(b"".join(source for source in sources if b"import jit" in source)).hexdigest()
    return str(here / "__pycache__" / f"numba-{digest[:12]}")
