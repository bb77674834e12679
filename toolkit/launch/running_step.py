"""One srun: a job step that runs, its pipe, what came back through it, and its end, which a lost node must not hold up.

Knows no processes: ``slurm.py`` makes states of what a step says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

KILL_S = 20.0  # srun's own way of ending a step takes Slurm's KillWait at most, and mostly no time
LOST_KILL_S = 2.0  # where a node of the step does not answer: srun would wait for it


class RunningStep:
    """One srun: its processes, its pipe, and the states that came back."""

    def __init__(self, name: str, argv: Sequence[str], messages: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self._messages = messages
        self._rest = b""
        with messages.open("ab") as out:
            self._srun = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env={**os.environ, **env},
                start_new_session=True,  # Ctrl-C in an salloc shell is the launcher's to deal with
            )
        assert self._srun.stdout is not None
        self._stdout = self._srun.stdout.fileno()
        os.set_blocking(self._stdout, False)

    def lines(self, prefix: str) -> Iterator[bytes]:
        """What came since the last call: the rest of each whole line that begins with ``prefix``."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._stdout, 65536):
                self._rest += data
        *whole, self._rest = self._rest.split(b"\n")
        for line in whole:
            if line.startswith(prefix.encode()):
                yield line[len(prefix) :]
            else:
                with self._messages.open("ab") as out:  # a login script, a container runtime
                    out.write(line + b"\n")

    @property
    def over(self) -> bool:
        return self._srun.poll() is not None

    def call_off(self) -> None:
        """Its processes end by themselves now, each within its grace."""
        assert self._srun.stdin is not None
        with contextlib.suppress(OSError):
            self._srun.stdin.close()

    def wait(self, deadline: float) -> bool:
        """Whether it was over by ``deadline`` on the monotonic clock."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._srun.wait(max(0.0, deadline - time.monotonic()))
        return self.over

    def terminate(self) -> None:
        """By way of Slurm: SIGKILL to every task."""
        self._srun.terminate()

    def kill(self) -> None:
        """srun itself, which a node that does not answer would hold."""
        log.warning("step %s does not end: Slurm ends it with the job", self.name)
        self._srun.kill()
        self._srun.wait()

    def messages(self) -> str:
        return self._messages.read_text(errors="replace").strip()


def end_steps(steps: Sequence[RunningStep], lost: bool) -> None:
    """Ends those that are not over. ``lost``: a node does not answer."""
    late = [step for step in steps if not step.over]
    for step in late:
        step.terminate()
    deadline = time.monotonic() + (LOST_KILL_S if lost else KILL_S)
    for step in late:
        if not step.wait(deadline):
            step.kill()
