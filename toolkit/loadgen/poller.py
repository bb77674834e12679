"""When sockets are read, at half the price of asking the event loop for each. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time

from toolkit.loadgen.receive import Receiver


class Poller:
    """Has the receiver read whenever a socket has something.

    Waking up for one packet costs more than reading it. From ``BUSY`` packets a millisecond on, the sockets are looked
    at once every ``PAUSE_S`` instead: far less than the gap between two tokens of one stream, so that reads do not
    coalesce, and the stamps are the kernel's anyway.
    """

    BUSY = 8
    PAUSE_S = 0.001

    def __init__(self, receiver: Receiver) -> None:
        self._loop = asyncio.get_running_loop()
        self._receiver = receiver
        self._closed = False
        self._paused = False
        self._since, self._recent = time.monotonic(), 0
        self._last = self._since
        self._loop.add_reader(receiver.epoll.fileno(), self._drain)

    def close(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._receiver.epoll.fileno())

    def breathe(self) -> None:
        """Reads if it is time to: called between requests, of which many may end and begin at once."""
        if self._paused and time.monotonic() - self._last >= self.PAUSE_S:
            self._read()

    def _read(self) -> int:
        """Returns how many sockets had something."""
        self._last = time.monotonic()
        return self._receiver.drain()

    def _drain(self) -> None:
        if self._closed:
            return
        count = self._read()
        if self._paused:
            if count >= self.BUSY:
                self._loop.call_later(self.PAUSE_S, self._drain)
                return
            self._paused = False
            self._loop.add_reader(self._receiver.epoll.fileno(), self._drain)
        self._recent += count
        now = self._last
        if now - self._since >= self.PAUSE_S:
            if self._recent >= self.BUSY * (now - self._since) / self.PAUSE_S:
                self._paused = True
                self._loop.remove_reader(self._receiver.epoll.fileno())
                self._loop.call_later(self.PAUSE_S, self._drain)
            self._since, self._recent = now, 0
