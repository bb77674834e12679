"""The load generator's C, which reads what a server sends, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/unit/test_loadgen_scan.py", "tests/unit/test_loadgen_http1.py", "tests/process/test_loadgen_client.py",
)  # fmt: skip


@pytest.mark.slow
def test_no_byte_is_touched_that_is_not_its_own(tmp_path: Path) -> None:
    """Runs the tests of both C files again, with a compiler that adds the checks: the first fault ends the process."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc")
    runtime = subprocess.run([gcc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(runtime.stdout.strip()).is_file():
        pytest.skip("gcc has no address sanitizer")
    checked = tmp_path / "checked-cc"
    checked.write_text(f'#!/bin/sh\nexec {gcc} -g -fsanitize=address,undefined -fno-sanitize-recover=all "$@"\n')
    checked.chmod(0o755)
    env = os.environ | {
        "CC": str(checked),
        "WIDEEP_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    words = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not aiohttp and not Python", *TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()} == {"receive", "scan"}
