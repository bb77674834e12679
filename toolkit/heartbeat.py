"""A sign of life of a run: ``heartbeat.json`` in its folder, so that a dead run is not taken for a long one.

status.json says ``running`` for ever when its launcher is killed. While it lives, a thread renews the heartbeat; who
reads the folder asks ``run_state``. On the same machine the process itself is looked for; from elsewhere its silence
tells, and clocks of different hosts are trusted to a minute, no more. Imports nothing of the toolkit but records/.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import psutil

from toolkit.records.files import write_json
from toolkit.records.status import RunStatus

FILE = "heartbeat.json"
EVERY_S = 2.0
SILENCE_HERE_S = 20.0  # on this host: ten beats
SILENCE_ELSEWHERE_S = 120.0  # on another: its clock may differ, and a shared file system may lag


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of a launcher.

    Attributes:
        boot, pids: which kernel and which namespace of pids it lives in: where they are ours, its pid is enough.
        started: when the process was created, Unix seconds; a later one with its pid is another.
        time: of this beat, Unix seconds.
    """

    host: str
    boot: str
    pids: str
    pid: int
    started: float
    time: float

    @classmethod
    def now(cls) -> Heartbeat:
        me = psutil.Process()
        return cls(platform.node(), _boot(), _pids(), me.pid, me.create_time(), time.time())

    @property
    def alive(self) -> bool:
        if self.pids and (self.boot, self.pids) == (_boot(), _pids()):
            try:
                process = psutil.Process(self.pid)
                ours = abs(process.create_time() - self.started) < 1.0
                return ours and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False
        limit = SILENCE_HERE_S if self.boot == _boot() else SILENCE_ELSEWHERE_S
        return time.time() - self.time < limit


@contextlib.contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Renews the heartbeat of ``folder`` within the block, whatever the main thread does; removes it at its end."""
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # a full disk is no reason to end a run
                write_json(folder / FILE, asdict(Heartbeat.now()))
            over.wait(EVERY_S)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> Heartbeat | None:
    """The last beat; None where there is none, as after a run that ended in order."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Heartbeat)
    except (OSError, msgspec.DecodeError):
        return None


def run_state(folder: Path, status: RunStatus) -> str:
    """The state of a run as it is, not as it was written: ``dead`` for ``running`` without a sign of life."""
    if status.state != "running":
        return status.state
    beat = read(folder)
    return "running" if beat is not None and beat.alive else "dead"


def _pids() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()
