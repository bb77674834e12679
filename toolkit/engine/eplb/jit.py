"""numba where it is installed, plain Python where it is not: one source for both.

Functions under ``jit`` use only what both run alike: numpy arrays, scalars, loops. Without numba they give the same
placements, some hundred times slower. Knows nothing of experts.
numba notices a change of a function's own file, not of files that it calls into: after changing kernels.py or bounds.py
delete toolkit/engine/eplb/__pycache__.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None


def jit(function: F) -> F:
    """Compiles ``function`` on its first call (kept on disk for the next process), if numba is there."""
    if not COMPILED:
        return function
    import numba

    compiled: F = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled
