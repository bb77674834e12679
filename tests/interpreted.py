"""Kernels in Triton's interpreter, on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="pip install triton (1 GB): its interpreter runs the kernels here"
)


def interpret(module: str, function: str) -> None:
    """Calls ``function`` of ``module`` with each of its ``SHAPES``, in a process of its own: the interpreter is chosen
    when the kernels are imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    code = f"from {module} import SHAPES, {function}\nfor shape in SHAPES: {function}(*shape)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
