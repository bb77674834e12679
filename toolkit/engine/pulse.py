"""Pulse: where a rank is, in a small file that is renewed every second, for whoever watches ranks that do not move.

The worker's loop sets plain attributes (nanoseconds); a thread of its own writes them, so that a rank whose main thread
hangs still says where. A rank that is stopped, or held inside native code that keeps Python's lock, says nothing new:
its silence is the message. The file is overwritten in place, one short write: cheap on a shared file system.
Owns the file; what a pulse means is ``launch/stall.py``'s. Used by worker.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

FOLDER = "pulse"
EVERY_S = 1.0
BYTES = 256  # of the file, always: a reader never sees the rest of a longer pulse


class Beat(msgspec.Struct, frozen=True):
    """One look at a rank.

    Attributes:
        turn: times round the worker's loop; all ranks make the same turns while any has work.
        step: forward passes since start.
        collectives: collective operations it has begun; ranks that wait for another have begun one more than it.
        phase: idle (asleep until a message), take, results, schedule, agree, step, reply.
        requests: it holds.
        time: Unix seconds.
    """

    rank: int
    turn: int
    step: int
    collectives: int
    phase: str
    requests: int
    time: float


class Pulse:
    """The pulse of this process. Set ``turn``, ``step``, ``phase`` and ``requests``; ``close`` at the end."""

    def __init__(self, folder: Path, rank: int, collectives: Callable[[], int]) -> None:
        self.turn = self.step = self.requests = 0
        self.phase = "start"
        self._rank, self._collectives = rank, collectives
        self._over = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path_of(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._thread = threading.Thread(target=self._write_all, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=5.0)

    def _write_all(self) -> None:
        try:
            while not self._over.is_set():
                self._write()
                self._over.wait(EVERY_S)
        except OSError as error:  # a full disk: the service goes on without being watched
            log.warning("no pulse any more: %s", error)
        finally:
            os.close(self._fd)

    def _write(self) -> None:
        beat = Beat(self._rank, self.turn, self.step, self._collectives(), self.phase, self.requests, time.time())
        os.pwrite(self._fd, msgspec.json.encode(beat).ljust(BYTES), 0)


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """The last pulse of a rank; None before its first, or when a read met a write."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path_of(folder, rank).read_bytes(), type=Beat)
    return None
