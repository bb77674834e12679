"""How far apart two nodes' clocks are: one tells the time on a port, the other asks.

Knows no run and no Slurm. Used by ``node_checks.py``.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

PINGS = 8
STAMP = struct.Struct("!d")


@contextlib.contextmanager
def clock(host: str, port: int) -> Iterator[None]:
    """Tells the time on ``port`` meanwhile, to whoever asks."""
    over = threading.Event()
    with socket.create_server((host, port), reuse_port=False) as server:
        server.settimeout(0.2)

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    caller, _ = server.accept()
                    with caller:
                        caller.settimeout(5.0)
                        while caller.recv(1):
                            caller.sendall(STAMP.pack(time.time()))

        thread = threading.Thread(target=serve, name="clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def measure_offset(host: str, port: int, wait_s: float) -> float:
    """This clock minus that of ``host``, seconds. Raises ``OSError`` when nobody answers there."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5.0)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    best = (float("inf"), 0.0)
    with connection:
        for _ in range(PINGS):
            sent = time.time()
            connection.sendall(b"?")
            data = connection.recv(STAMP.size, socket.MSG_WAITALL)
            came = time.time()
            if len(data) < STAMP.size:
                raise OSError("the connection was closed")
            best = min(best, (came - sent, (sent + came) / 2 - STAMP.unpack(data)[0]))
    return best[1]
