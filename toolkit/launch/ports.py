"""Ports of this machine: which are taken and by whom, and a free range for a run."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket

import psutil

FIRST, LAST = 20_000, 32_000  # below the range from which the kernel gives out ports of its own accord
SLURM_BASE = 25_000  # a plan for other machines, whose ports cannot be asked for here


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
    """First of ``count`` consecutive free ports. Starts looking at a random place, because runs start together."""
    assert 0 < count < LAST - FIRST, f"{count} ports asked for"
    start = random.SystemRandom().randrange(FIRST, LAST - count)
    for base in itertools.chain(range(start, LAST - count), range(FIRST, start)):
        if all(is_free(base + i) for i in range(count)):
            return base
    raise ValueError(f"no {count} consecutive free ports between {FIRST} and {LAST}: set cluster.port to a free range")


def owner(port: int) -> str:
    """``, taken by pid 123 (nginx)`` when the system lets us see who listens on ``port``; otherwise empty."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                name = psutil.Process(connection.pid).name() if connection.pid else ""
                return f", taken by pid {connection.pid} ({name})" if connection.pid else ""
    return ""
