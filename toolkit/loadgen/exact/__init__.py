"""A server that answers on an exact schedule and logs what it did: the yardstick of ``selfcheck`` and the benchmarks.

``server.c`` is compiled with the system's C compiler when it is first needed; ``fallback.py`` is the same in Python,
for machines without one, and bears about a tenth of the load. Both write the same log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.loadgen.compiled import build

SOURCE = Path(__file__).with_name("server.c")
START_S = 20.0


@dataclass(frozen=True)
class Schedule:
    """When tokens are due: see the head of ``server.c``."""

    ttft_ms: float = 200.0
    itl_ms: float = 10.0
    grid_ms: float = 0.0


@dataclass
class Truth:
    """What the server did. Nanoseconds of CLOCK_REALTIME, one array for all requests, in the order they ended.

    Attributes:
        arrived: when each request had come, by the kernel's stamp.
        sent: just before each token's send, one array a request.
    """

    arrived: NDArray[np.int64]
    sent: list[NDArray[np.int64]]

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        return _seconds(np.array([s[0] for s in self.sent], np.int64) - self.arrived)

    @property
    def e2e_s(self) -> NDArray[np.float64]:
        return _seconds(np.array([s[-1] for s in self.sent], np.int64) - self.arrived)

    @property
    def itl_s(self) -> NDArray[np.float64]:
        return _seconds(np.concatenate([np.diff(s) for s in self.sent]))

    def after(self, skip: int) -> Truth:
        """Without the first ``skip`` requests to arrive: the client's warm-up."""
        keep = np.sort(np.argsort(self.arrived, kind="stable")[skip:])
        return Truth(self.arrived[keep], [self.sent[i] for i in keep])


@dataclass
class ExactServer:
    """A running server; ``truth`` holds what it did once the ``running`` block has ended."""

    url: str
    compiled: bool
    pid: int
    truth: Truth = field(default_factory=lambda: Truth(np.empty(0, np.int64), []))


@contextlib.contextmanager
def running(schedule: Schedule, compiled: bool = True, cpu: int = -1) -> Iterator[ExactServer]:
    """Serves on loopback until the block ends.

    Args:
        compiled: use the compiled server where a C compiler is found.
        cpu: core to stay on; -1: any.
    """
    program = build(SOURCE) if compiled else None
    with tempfile.TemporaryDirectory(prefix="exact-") as folder:
        truth = Path(folder) / "truth"
        times = [str(round(ms * 1000)) for ms in (schedule.ttft_ms, schedule.itl_ms, schedule.grid_ms)]
        words = [str(program)] if program else [sys.executable, "-m", f"{__name__}.fallback"]
        process = subprocess.Popen([*words, *times, str(truth)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if cpu >= 0:
                os.sched_setaffinity(process.pid, {cpu})
            word, _, port = process.stdout.readline().partition(" ")
            if word != "PORT":
                raise OSError(f"the exact-schedule server did not start: exit code {process.wait()}")
            server = ExactServer(f"http://127.0.0.1:{int(port)}", program is not None, process.pid)
            yield server
            process.send_signal(signal.SIGTERM)
            process.wait(START_S)
            server.truth = read_truth(truth)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _seconds(nanoseconds: NDArray[np.int64]) -> NDArray[np.float64]:
    return nanoseconds.astype(np.float64) * 1e-9


def read_truth(path: Path) -> Truth:
    """The log of a server. Raises ``ValueError`` when it is cut off."""
    numbers = np.fromfile(path, "<i8")
    arrived, sent, at = [], [], 0
    while at < len(numbers):
        count = int(numbers[at + 1])
        if at + 2 + count > len(numbers):
            raise ValueError(f"{path}: the log ends in the middle of a request")
        arrived.append(numbers[at])
        sent.append(numbers[at + 2 : at + 2 + count])
        at += 2 + count
    return Truth(np.array(arrived, np.int64), sent)
