"""Ports of one machine: which are taken and by whom, and a range that is one run's alone while it lasts.

Looking for free ports is not enough when runs start together: both would see the same ones. So a port is claimed by
binding its guard, the port ``GUARD`` above it, on loopback, without listening: the kernel gives a guard to one process
only, whoever the user is and whatever /tmp he sees, and takes it back when that process ends.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket

import psutil

FIRST, LAST = 20_000, 26_000  # with their guards, below the range from which the kernel gives out ports by itself
GUARD = 6_000
SLURM_BASE = 20_000  # a plan for other machines, whose ports cannot be asked for here


class Claim:
    """``count`` consecutive ports from ``first`` on, ours until ``close`` or the end of this process."""

    def __init__(self, first: int, guards: list[socket.socket]) -> None:
        self.first = first
        self._guards = guards

    def close(self) -> None:
        for guard in self._guards:
            guard.close()


def claim(count: int) -> Claim:
    """Takes ``count`` consecutive free ports. Starts looking at a random place, because runs start together."""
    for first in _starts(count):
        guards = _guard(first, count)
        if guards is None:
            continue
        if all(is_free(first + i) for i in range(count)):
            return Claim(first, guards)
        Claim(first, guards).close()
    raise ValueError(f"no {count} consecutive free ports between {FIRST} and {LAST}: set cluster.port to a free range")


def is_free(port: int, host: str = "") -> bool:
    """True when ``port`` can be bound on ``host`` (empty: on every address of this machine)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_range(count: int) -> int:
    """First of ``count`` consecutive ports that are free now and that no run has claimed."""
    taken = claim(count)
    taken.close()
    return taken.first


def owner(port: int) -> str:
    """``, taken by pid 123 (nginx)`` when the system lets us see who listens on ``port``; otherwise empty."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                name = psutil.Process(connection.pid).name() if connection.pid else ""
                return f", taken by pid {connection.pid} ({name})" if connection.pid else ""
    return ""


def _starts(count: int) -> itertools.chain[int]:
    assert 0 < count < LAST - FIRST, f"{count} ports asked for"
    start = random.SystemRandom().randrange(FIRST, LAST - count)
    return itertools.chain(range(start, LAST - count), range(FIRST, start))


def _guard(first: int, count: int) -> list[socket.socket] | None:
    """The guards of ``count`` ports, all or none."""
    guards = []
    for port in range(first + GUARD, first + GUARD + count):
        guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        guards.append(guard)
        try:
            guard.bind(("127.0.0.1", port))
        except OSError:
            for taken in guards:
                taken.close()
            return None
    return guards
