"""A rank that hangs while the others wait for it: the run ends by itself and says which one it is, with stacks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_lifecycle import Run
from toolkit.records.status import read_status

STALL = ["health.stall_s=20", "health.preflight=false"]

# A worker whose scheduler blocks, in Python, as soon as a file says so: what a dead lock looks like from outside.
BLOCKS = """
import os, sys, time
from toolkit.engine import worker
from toolkit.engine.scheduler import Scheduler

schedule = Scheduler.schedule

def waits_for_a_lock(self, hold=False):
    while os.path.exists(os.environ["BLOCK_FILE"]) and "1" in sys.argv[sys.argv.index("--rank") + 1:]:
        time.sleep(0.1)
    return schedule(self, hold)

Scheduler.schedule = waits_for_a_lock
worker.main()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Ranks run ``BLOCKS`` in place of the worker: a python in front of the real one sees to that."""
    (tmp_path / "blocks.py").write_text(BLOCKS)
    monkeypatch.setenv("BLOCK_FILE", str(tmp_path / "block"))
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    script = f"""#!/bin/sh
case "$2" in toolkit.engine.worker) shift 2; exec {sys.executable} {tmp_path}/blocks.py "$@";; esac
exec {sys.executable} "$@"
"""
    python.write_text(script)
    python.chmod(0o755)
    run = Run(tmp_path / "results", STALL, launcher=[sys.executable, "-c", LAUNCHER, str(python)])
    try:
        run.wait_for_load()
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()


LAUNCHER = """
import sys
from toolkit.launch.adapters import native
from toolkit.launch import __main__ as launch
python = sys.argv.pop(1)
native._python = lambda cfg, module: (python, "-m", module, "--args")
sys.exit(launch.main())
"""


def check(run: Run, output: str, rank: int) -> str:
    """The run failed, naming ``rank``, and can be taken up; gives the log of the rank."""
    assert run.process.returncode == 1
    status = read_status(run.folder)
    assert status.state == "failed" and f"rank-{rank} is behind" in status.reason, status.reason
    assert f"rank-{rank} is behind" in output
    assert [point.state for point in status.points] == ["cancelled", "cancelled"]
    for other in range(2):
        assert f"--- stacks of rank-{other}" in (run.folder / "logs" / f"rank-{other}.log").read_text()
    waiting = (run.folder / "logs" / f"rank-{1 - rank}.log").read_text()
    stack = waiting.partition("--- stacks of")[2]
    assert any(name in stack for name in ("agree", "all_to_all", "all_gather", "all_reduce")), "it waits for its peers"
    return (run.folder / "logs" / f"rank-{rank}.log").read_text()


def test_a_stopped_rank_is_named(run: Run) -> None:
    pid = run.pid("rank-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        output = run.end(within_s=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    check(run, output, 0)
    assert "its process is stopped" in output


def test_a_rank_that_blocks_in_python_is_named_with_the_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "block").touch()
    output = run.end(within_s=300)
    log = check(run, output, 1)
    assert "waits_for_a_lock" in log.partition("--- stacks of")[2]
    assert "waits_for_a_lock" in output, "the stack of the one that is behind is shown"
