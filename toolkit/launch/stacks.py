"""Stacks of processes that hang, Python's and native ones, into their logs, on whichever node they are.

The launcher cannot reach into another node; the supervisor beside each process (``rank.py``) can. ``ask`` leaves a word
in the run folder, every supervisor finds it, dumps its process's stack into the process's log and says how the process
is (``Dumped``). With py-spy installed the stack is whole, native frames included, and also that of a process that was
stopped; without it the process dumps its Python frames itself (faulthandler on SIGUSR1, where it listens for that).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from toolkit.launch.launcher import STATE_DIR, tail
from toolkit.records.files import write_json

FOLDER = "stacks"  # inside STATE_DIR
WORD = "wanted"
LOOK_S = 1.0  # between two looks for the word: a shared file system serves many ranks
DUMP_S = 30.0
SIGNAL = signal.SIGUSR1
MARK, LINES = "--- stacks of", 24


class Dumped(msgspec.Struct, frozen=True):
    """How a process was when its stack was taken; ``status`` is psutil's: running, sleeping, stopped, disk-sleep ..."""

    name: str
    status: str
    how: str


def ask(run_dir: Path, names: Sequence[str], most_s: float = DUMP_S + 15.0) -> dict[str, Dumped]:
    """Has the stacks of all processes dumped; gives what came of it by name, as far as it came in ``most_s``."""
    folder = run_dir / STATE_DIR / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / WORD).touch()
    deadline = time.monotonic() + most_s
    while True:
        found = {name: dumped for name in names if (dumped := _read(folder / f"{name}.json")) is not None}
        if len(found) == len(names) or time.monotonic() > deadline:
            (folder / WORD).unlink(missing_ok=True)
            return found
        time.sleep(0.1)


class Dumper:
    """The supervisor's part, for one process."""

    def __init__(self, run_dir: Path, name: str, log: Path) -> None:
        self._folder = run_dir / STATE_DIR / FOLDER
        self._name, self._log = name, log
        self._looked = 0.0

    def look(self, pid: int) -> None:
        """Dumps the stack of ``pid`` if that is asked for and not done. Cheap; call it a few times a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        answer = self._folder / f"{self._name}.json"
        if (self._folder / WORD).exists() and not answer.exists():
            dumped = dump(pid, self._name, self._log)
            with contextlib.suppress(OSError):
                write_json(answer, msgspec.to_builtins(dumped))


def dump(pid: int, name: str, log: Path) -> Dumped:
    """Appends the stack of process ``pid`` to ``log``."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return Dumped(name, "gone", "")
    with log.open("ab") as out:
        out.write(f"\n{MARK} {name} (pid {pid}, {status}), asked for by the launcher\n".encode())
        out.flush()
        how = _with_py_spy(pid, status, out.fileno()) or _by_signal(pid)
        if not how:
            out.write(b"no stack: py-spy is not installed or not permitted, and the process listens for no signal\n")
    return Dumped(name, status, how)


def last_dump(log: Path) -> list[str]:
    """The begin of the last stack in a log: that of the main thread, which hangs."""
    with contextlib.suppress(OSError):
        lines = tail(log, 500)
        marks = [index for index, line in enumerate(lines) if line.startswith(MARK)]
        return list(lines[marks[-1] :][:LINES]) if marks else []
    return []


def _with_py_spy(pid: int, status: str, out: int) -> str:
    """A process that is stopped cannot be attached to: its memory is read as it lies, without native frames."""
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    ways = (["--nonblocking"],) if status == psutil.STATUS_STOPPED else (["--native"], ["--nonblocking"])
    for way in ways:
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            command = [program, "dump", "--pid", str(pid), *way]
            if subprocess.run(command, stdout=out, stderr=out, timeout=DUMP_S / 2, check=False).returncode == 0:
                return f"py-spy {way[0]}"
    return ""


def _by_signal(pid: int) -> str:
    """Only where the process handles it: whoever does not would be ended by it."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)
        if caught >> (SIGNAL - 1) & 1:
            os.kill(pid, SIGNAL)
            time.sleep(0.5)  # it writes into its log by itself, beside what is written here
            return "faulthandler"
    return ""


def _read(path: Path) -> Dumped | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Dumped)
    return None
