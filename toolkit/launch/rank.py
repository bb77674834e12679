"""Beside a process, on its node: pick the task's process, run it, report it, and end it when it must end.

The process's output goes to its log, its state to its state file (``launcher.ProcessState``). It ends with the
command, on SIGTERM, when the launcher is gone, or when whoever started this task is gone; in each case nothing of the
command is left. It does not know what the command is.

Locally submitit runs a pickled ``Task``. On Slurm a job step runs ``python -m toolkit.launch.rank STEP.json`` in each
task: its standard input is a pipe from the launcher, and its end is the launcher's word, or death; states also go to
standard output, which reaches the launcher without a file system in between. Where a node was cut off from srun, that
pipe may stay open for ever: then the launcher's heartbeat tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from toolkit import heartbeat
from toolkit.launch import child
from toolkit.launch.launcher import ProcessSpec, ProcessState
from toolkit.launch.stacks import Dumper
from toolkit.records.files import write_json

POLL_S = 0.2
LOOK_S, MISSES = 2.0, 5  # a heartbeat is missing when it was, in so many looks: a file system may be slow
LAG_S = 5.0
NOT_STARTED = 127  # a shell's exit code for a command that is not there
SAYS = "toolkit-state "  # begins a line of standard output that is a state; a login script may print others
STDIN = 0


@dataclass(frozen=True)
class Task:
    """What every task of a job is given; small and without secrets, because submitit writes it to disk.

    Attributes:
        launcher: (pid, create_time) of the launcher, when it is on this host; the task ends with it.
        visible_gpus: the launcher's CUDA_VISIBLE_DEVICES (None: not set), which submitit replaces.
    """

    specs: tuple[ProcessSpec, ...]
    run_dir: Path
    launcher: tuple[int, float] | None
    visible_gpus: str | None

    def __call__(self) -> int:
        """Runs the process of this task; called by submitit in each task. Returns the process's exit code."""
        import submitit

        return supervise(self, self.specs[submitit.JobEnvironment().global_rank])


@dataclass(frozen=True)
class Step:
    """What every task of a Slurm job step is given, as JSON. Without secrets.

    Attributes:
        nodes: name of a node, as Slurm has it -> its processes, in the order of the tasks there.
    """

    run_dir: Path
    nodes: Mapping[str, tuple[ProcessSpec, ...]]


def main() -> int:
    """In a task of a job step: runs its process, which node and place within the node select."""
    node = os.environ["SLURMD_NODENAME"]
    try:
        step = msgspec.json.decode(_read(Path(sys.argv[1])), type=Step, dec_hook=lambda kind, value: kind(value))
    except OSError as error:  # nobody here knows the process's name; its node is enough
        note = f"{node} cannot read {error.filename}: {error.strerror}"
        _say(ProcessState("", "lost", host=node, ended=time.time(), note=note))
        return NOT_STARTED
    spec = step.nodes[node][int(os.environ["SLURM_LOCALID"])]
    task = Task((spec,), step.run_dir, launcher=None, visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    signs = _Signs(step.run_dir)
    return supervise(task, spec, called_off=lambda: _input_ended() or signs.missing(), say=_say)


def _read(path: Path) -> bytes:
    """What the launcher wrote a moment ago: a network file system may need another one to show it."""
    deadline = time.monotonic() + LAG_S
    while True:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


class _Signs:
    """The launcher's heartbeat in the run folder. One that has never been seen is not missed."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._seen, self._misses, self._looked = False, 0, 0.0

    def missing(self) -> bool:
        """Cheap: asked a few times a second, looks every few seconds."""
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            beat = heartbeat.read(self._run_dir)
            alive = beat is not None and beat.alive
            self._seen = self._seen or alive
            self._misses = 0 if alive else self._misses + 1
        return self._seen and self._misses >= MISSES


def supervise(
    task: Task,
    spec: ProcessSpec,
    called_off: Callable[[], bool] = lambda: False,
    say: Callable[[ProcessState], None] = lambda state: None,
) -> int:
    """Runs ``spec`` to its end, or ends it; reports on the way. Returns its exit code.

    Args:
        called_off: asked a few times a second; true ends the process.
        say: is told each state, beside the state file.
    """
    stop: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        stop.append(signum)

    signal.signal(signal.SIGTERM, on_signal)
    parent, launcher = os.getppid(), child.find(*task.launcher) if task.launcher else None
    state, file = ProcessState(spec.name, host=socket.gethostname()), spec.state_file(task.run_dir)

    def report(new: ProcessState) -> None:
        say(new)
        write_json(file, dataclasses.asdict(new))

    if task.launcher and launcher is None:
        return NOT_STARTED
    try:
        process = child.start(spec.argv, task.run_dir / spec.log, _environment(task, spec))
    except OSError as error:
        (task.run_dir / spec.log).write_text(f"could not start {spec.argv[0]}: {error}\n")
        report(dataclasses.replace(state, state="exited", returncode=NOT_STARTED, ended=time.time()))
        return NOT_STARTED
    created = psutil.Process(process.pid).create_time()  # our child exists, at least as a zombie
    state = dataclasses.replace(state, state="running", pid=process.pid, create_time=created)
    report(state)
    dumper = Dumper(task.run_dir, spec.name, task.run_dir / spec.log)
    while not stop and not called_off() and os.getppid() == parent and (launcher is None or child.is_alive(launcher)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            break
        dumper.look(process.pid)
    code = child.end(process, spec.grace_s)
    report(dataclasses.replace(state, state="exited", returncode=code, ended=time.time()))
    return code


def _environment(task: Task, spec: ProcessSpec) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    if task.visible_gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = task.visible_gpus
    return env | dict(spec.env)


def _input_ended() -> bool:
    ready, _, _ = select.select([STDIN], [], [], 0)
    return bool(ready) and not os.read(STDIN, 4096)


def _say(state: ProcessState) -> None:
    """One write of one line, which srun keeps whole. A launcher that has gone hears nothing more."""
    with contextlib.suppress(OSError):
        os.write(1, f"{SAYS}{msgspec.json.encode(state).decode()}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
