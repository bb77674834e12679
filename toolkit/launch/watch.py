"""Watches a job's processes: a dead one fails the run, with its name, its exit code and the end of its log."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from toolkit.launch import stacks
from toolkit.launch.launcher import Job, ProcessState, tail

SETTLE_S = 0.5  # when one rank dies its peers fail within milliseconds; wait for them, then name the cause
LOST_NODE = "no answer from slurmd on "  # begins a reason: nodes are down, or will be found to be


def lost(names: Sequence[str], reason: str) -> str:
    """``reason``, which the loss of nodes may have brought about, with their names before it."""
    return f"{LOST_NODE}{', '.join(names)}; {reason}"


def lost_nodes(reason: str) -> list[str]:
    """The names in a reason of ``lost``; none in another."""
    return reason.removeprefix(LOST_NODE).partition("; ")[0].split(", ") if reason.startswith(LOST_NODE) else []


class RunFailed(Exception):
    """The run cannot go on. ``str()`` is the reason in a line; ``log_tail`` the end of the log that tells more."""

    def __init__(self, reason: str, log: Path | None = None, lines: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.log = log
        self.log_tail = lines or (tail(log) if log else [])


class Steps(Protocol):
    """What is known of the ranks' steps (``stall.py``)."""

    def check(self) -> None: ...

    def marks(self) -> object: ...


class Watch:
    """Watches the processes of ``job`` and, where ``steps`` are given, whether its ranks get on."""

    def __init__(self, job: Job, run_dir: Path, steps: Steps | None = None) -> None:
        self._job = job
        self._run_dir = run_dir
        self._steps = steps

    def check_steps(self) -> None:
        """Raises ``RunFailed`` when the ranks have requests and make no step."""
        if self._steps is not None:
            self._steps.check()

    def marks(self) -> object:
        """Something that changes as long as any process starts or any rank gets on."""
        return self.running(), self._steps.marks() if self._steps is not None else None

    def dump_stacks(self) -> None:
        """The stack of every process, into its log."""
        stacks.ask(self._run_dir, [spec.name for spec in self._job.specs])

    def check(self) -> None:
        """Raises ``RunFailed`` when a process has ended: each of them is there for the whole run."""
        if self.all_alive():
            return
        time.sleep(SETTLE_S)
        dead = sorted((state for state in self._critical() if not state.alive), key=_cause_first)
        specs = {spec.name: spec for spec in self._job.specs}
        others = f" (then {_names(dead[1:])})" if dead[1:] else ""
        raise RunFailed(f"{describe(dead[0])}{others}", self._run_dir / specs[dead[0].name].log)

    def wait_for_death(self, most_s: float) -> None:
        """Returns when a process has ended, or after ``most_s``."""
        deadline = time.monotonic() + most_s
        while self.all_alive() and time.monotonic() < deadline:
            time.sleep(0.1)

    def running(self) -> int:
        """How many processes run; changes while a job starts."""
        return sum(state.state == "running" for state in self._job.poll())

    def all_alive(self) -> bool:
        return all(state.alive for state in self._critical())

    def _critical(self) -> list[ProcessState]:
        """The states of those without which the run cannot go on."""
        return [state for spec, state in zip(self._job.specs, self._job.poll(), strict=True) if spec.critical]


def describe(state: ProcessState) -> str:
    """``rank-2 was killed by SIGKILL``"""
    if state.state == "lost":
        return f"{state.name} was lost: {state.note or 'the task that ran it ended without a report'}"
    code = state.returncode
    if code is not None and code < 0:
        return f"{state.name} was killed by {_signal_name(-code)}"
    return f"{state.name} exited with code {code}"


def exit_text(name: str, code: int) -> str:
    return describe(ProcessState(name, "exited", code))


def _names(states: Sequence[ProcessState], most: int = 4) -> str:
    more = f" and {len(states) - most} more" if len(states) > most else ""
    return ", ".join(state.name for state in states[:most]) + more


def _cause_first(state: ProcessState) -> tuple[bool, float]:
    """Killed before failed, then by time: the peers of a killed rank end with errors of their own."""
    return (state.returncode is None or state.returncode >= 0, state.ended)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
