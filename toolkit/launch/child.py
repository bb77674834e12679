"""A child process that cannot outlive its parent, nor leave children of its own behind.

The child leads its own session, so that Ctrl-C in a terminal reaches only the launcher, which then stops
everything in order. On Linux the kernel kills the child when its parent dies, even by SIGKILL.
Knows nothing of the toolkit. Used by ``rank.py`` (ranks, frontend) and ``run.py`` (load generator, model build).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

PR_SET_PDEATHSIG = 1


def start(argv: Sequence[str], log: Path | None, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts ``argv`` with stdout and stderr appended to ``log`` (None: inherited) and stdin closed.

    Raises:
        OSError: the command could not be started.
    """
    with contextlib.ExitStack() as stack:
        out: IO[bytes] | None = stack.enter_context(log.open("ab")) if log else None
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            env=None if env is None else dict(env),
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  allocates nothing, takes no lock
        )


def end(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Ends the child's process group: SIGTERM, SIGKILL after ``grace_s``. Returns the child's exit code."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    return reap(process)


def reap(process: subprocess.Popen[bytes]) -> int:
    """Kills whatever is left of the child's process group and returns the child's exit code."""
    _signal_group(process, signal.SIGKILL)
    return process.wait()


def find(pid: int, create_time: float) -> psutil.Process | None:
    """The process with ``pid`` that was created at ``create_time``; a later one with its pid does not count."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - create_time) < 1.0 else None
    except psutil.NoSuchProcess:
        return None


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    """The group's id is the child's pid, and stays taken while any member of the group lives."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def _die_with(parent: int) -> Callable[[], None]:
    """What the child does between fork and exec: default signals, and death with its parent."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before the fork

    def before_exec() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return before_exec
