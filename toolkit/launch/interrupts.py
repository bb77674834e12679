"""SIGINT, SIGTERM, SIGHUP and SIGUSR2 as an exception, at times when an exception can be dealt with.

SIGUSR2 is what Slurm is asked to send before the time limit (``sbatch.py``); many sites send it at preemption too.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ENDS_SOON = signal.SIGUSR2
NOTICE = "Slurm gave notice: the job's time limit is near, or it is preempted"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, ENDS_SOON)


class Cancelled(BaseException):
    """The user, or the system, asks the launcher to end. Not an ``Exception``: only ``run`` handles it."""


class Interrupts:
    """While entered, the signals raise ``Cancelled`` in the main thread."""

    def __init__(self) -> None:
        self._before: dict[int, object] = {}
        self._held = False
        self._pending: int | None = None

    def __enter__(self) -> Interrupts:
        self._before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is raised within the block; a signal that came meanwhile is raised at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        pending, self._pending = self._pending, None
        if pending is not None:
            raise _cancelled(pending)

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """For the teardown, which is bounded in time: signals that come meanwhile are dropped."""
        self._held = True
        try:
            yield
        finally:
            self._held, self._pending = False, None

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._held:
            raise _cancelled(signum)
        self._pending = signum


def _cancelled(signum: int) -> Cancelled:
    if signum == ENDS_SOON:
        return Cancelled(NOTICE)
    return Cancelled(f"cancelled by {signal.Signals(signum).name}")
