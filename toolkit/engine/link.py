"""A rank's two sockets: its inbox, and the way to the frontend.

Knows the wire (``messages.py``), not what messages mean. Read next: ``worker.py``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import zmq

from toolkit.engine.args import WorkerArgs
from toolkit.engine.messages import Control, ToFrontend, ToRank, decode_to_rank, encode

log = logging.getLogger(__name__)

BEAT_MS = 1000  # a sleeping leader says that it lives
PAUSE_MS = 1


class Link:
    """This rank's two sockets: its inbox, and the way to the frontend."""

    def __init__(self, args: WorkerArgs, rank: int, token: str) -> None:
        self._context = zmq.Context()
        self._token = token
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._inbox.bind(f"tcp://{args.rank_hosts[rank]}:{args.inbox_ports[rank]}")
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.connect("tcp://{}:{}".format(*args.frontend))
        self._early: list[ToRank] = []  # read and not yet received
        self.messages_seen = 0

    def receive(self, wait: bool, beat: Callable[[], None]) -> list[ToRank]:
        """All messages that have arrived; with ``wait``, sleeps until there is one and calls ``beat`` now and then."""
        if wait and not self._early:
            while not self._inbox.poll(BEAT_MS):
                beat()
        self._read()
        messages, self._early = self._early, []
        self.messages_seen += len(messages)
        return messages

    def pause(self) -> None:
        """Sleeps a moment: there is nothing to compute, but a transfer to look after."""
        self._inbox.poll(PAUSE_MS)

    def nap(self, seconds: float) -> None:
        """Sleeps; a ``Control`` that has come or comes ends it early, since it may say to sleep no longer."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if any(isinstance(message, Control) for message in self._early):
                return
            if self._inbox.poll(math.ceil(left * 1000)):
                self._read()

    def _read(self) -> None:
        while self._inbox.poll(0):
            try:
                self._early.append(decode_to_rank(self._inbox.recv_multipart(), self._token))
            except ValueError as error:
                log.warning("dropped a message: %s", error)

    def send(self, message: ToFrontend) -> None:
        self._outbox.send_multipart(encode(message, self._token))

    def close(self) -> None:
        self._context.destroy(linger=2000)
