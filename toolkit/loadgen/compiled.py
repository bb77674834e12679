"""C files of the load generator, compiled with the system's compiler when first needed and kept in the user's cache.

What needs one has a slower twin in Python: machines without a compiler can do everything, with less load.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.cache import cache_dir

log = logging.getLogger(__name__)


Signatures = Mapping[str, tuple[Any, ...]]  # function -> type of its result, of its arguments


def load(source: Path, signatures: Signatures) -> ctypes.CDLL | None:
    """``source`` as a library of typed functions; None where it cannot be compiled."""
    made = build(source, shared=True)
    if made is None:
        return None
    lib = ctypes.CDLL(str(made))
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def build(source: Path, shared: bool = False) -> Path | None:
    """The program made of ``source`` and the headers beside it, or the shared library.

    None where there is no compiler, or it fails (logged).
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    name = f"{source.parent.name}-{source.stem}"
    if not compiler:
        log.info("no C compiler: %s runs in Python", name)
        return None
    text = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    folder = cache_dir()
    made = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}{'.so' if shared else ''}"
    if made.is_file():
        return made
    part = made.with_name(f"{made.name}.{os.getpid()}.part")
    options = ["-O2", "-Wall", *(["-shared", "-fPIC"] if shared else [])]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *options, "-o", str(part), str(source)], check=True, capture_output=True, text=True)
        part.replace(made)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("%s cannot be compiled (%s) and runs in Python", name, error)
        return None
    return made
