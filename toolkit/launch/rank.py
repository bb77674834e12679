"""Inside a launcher's task: pick the task's process, run it, report it, and end it when it must end.

Runs on the node of the process. The process's output goes to its log, its state to its state file
(``launcher.ProcessState``). It ends with the command, on SIGTERM, when the launcher is gone, or when whoever
started this task is gone; in each case nothing of the command is left. It does not know what the command is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from toolkit import records
from toolkit.launch import child
from toolkit.launch.launcher import ProcessSpec, ProcessState
from toolkit.launch.stacks import Dumper

POLL_S = 0.2
NOT_STARTED = 127  # a shell's exit code for a command that is not there


@dataclass(frozen=True)
class Task:
    """What every task of a job is given; small and without secrets, because submitit writes it to disk.

    Attributes:
        launcher: (pid, create_time) of the launcher, when it is on this host; the task ends with it.
        visible_gpus: the launcher's CUDA_VISIBLE_DEVICES (None: not set), which submitit replaces.
    """

    specs: tuple[ProcessSpec, ...]
    run_dir: Path
    grace_s: float
    launcher: tuple[int, float] | None
    visible_gpus: str | None

    def __call__(self) -> int:
        """Runs the process of this task; called by submitit in each task. Returns the process's exit code."""
        import submitit

        return supervise(self, self.specs[submitit.JobEnvironment().global_rank])


def supervise(task: Task, spec: ProcessSpec) -> int:
    """Runs ``spec`` to its end, or ends it; reports on the way. Returns its exit code."""
    stop: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        stop.append(signum)

    signal.signal(signal.SIGTERM, on_signal)
    parent, launcher = os.getppid(), child.find(*task.launcher) if task.launcher else None
    state, file = ProcessState(spec.name, host=socket.gethostname()), spec.state_file(task.run_dir)
    if task.launcher and launcher is None:
        return NOT_STARTED
    try:
        process = child.start(spec.argv, task.run_dir / spec.log, _environment(task, spec))
    except OSError as error:
        (task.run_dir / spec.log).write_text(f"could not start {spec.argv[0]}: {error}\n")
        _report(file, dataclasses.replace(state, state="exited", returncode=NOT_STARTED, ended=time.time()))
        return NOT_STARTED
    created = psutil.Process(process.pid).create_time()  # our child exists, at least as a zombie
    state = dataclasses.replace(state, state="running", pid=process.pid, create_time=created)
    _report(file, state)
    dumper = Dumper(task.run_dir, spec.name, task.run_dir / spec.log)
    while not stop and os.getppid() == parent and (launcher is None or child.is_alive(launcher)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            break
        dumper.look(process.pid)
    code = child.end(process, task.grace_s)
    _report(file, dataclasses.replace(state, state="exited", returncode=code, ended=time.time()))
    return code


def _environment(task: Task, spec: ProcessSpec) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    if task.visible_gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = task.visible_gpus
    return env | dict(spec.env)


def _report(file: Path, state: ProcessState) -> None:
    records.write_json(file, dataclasses.asdict(state))
