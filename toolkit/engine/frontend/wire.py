"""Wire: the frontend's sockets to the ranks of one worker, and the wake rule.

Whatever is sent, each rank gets exactly one message, its own or a ``Wake``, because all ranks take part in the step
that follows. Knows nothing of requests. Read next: ``ranks.py``, which uses it; ``messages.py``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from toolkit.engine.messages import ToRank, Wake, encode

log = logging.getLogger(__name__)


class Wire:
    """One inbox for what all ranks say, one outbox for each of them. ``close`` it.

    Args:
        inbox: (host, port) to bind.
        ranks: (host, port) of each rank's inbox.
        on_break: called with a rank when the connection to it breaks: its process has ended. None: nobody asks.

    Raises:
        ValueError: the inbox's address cannot be bound.
    """

    def __init__(
        self,
        inbox: tuple[str, int],
        ranks: Sequence[tuple[str, int]],
        token: str,
        on_break: Callable[[int], None] | None,
    ) -> None:
        self._addresses, self._token, self._on_break = ranks, token, on_break
        self._wake = encode(Wake(), token)
        self._context = zmq.asyncio.Context()
        self._inbox = self._bind(inbox)
        # Plain sockets: with no high-water mark a send never waits, so one message and its wakes go out with
        # nothing in between, and each rank sees them in order.
        self._plain = zmq.Context(self._context)
        self._outboxes: list[zmq.SyncSocket] = []
        self._monitors: list[asyncio.Task[None]] = []
        self.connect_all()

    async def receive(self) -> list[bytes]:
        """The frames of the next message of any rank."""
        frames: list[bytes] = await self._inbox.recv_multipart()
        return frames

    def send(self, rank: int, message: ToRank) -> None:
        """``message`` to a rank, a ``Wake`` to every other."""
        frames = encode(message, self._token)
        for other, outbox in enumerate(self._outboxes):
            outbox.send_multipart(frames if other == rank else self._wake, zmq.NOBLOCK)

    def send_all(self, message: ToRank) -> None:
        frames = encode(message, self._token)
        for outbox in self._outboxes:
            outbox.send_multipart(frames, zmq.NOBLOCK)

    def connect_all(self) -> None:
        """New connections to all ranks; what waits in old ones is dropped."""
        for monitor in self._monitors:
            monitor.cancel()
        for outbox in self._outboxes:
            outbox.disable_monitor()
            outbox.close()
        self._outboxes = [self._connect(address) for address in self._addresses]
        if self._on_break is not None:
            self._monitors = [asyncio.create_task(self._watch(r, self._on_break)) for r in range(len(self._outboxes))]

    async def close(self) -> None:
        for monitor in self._monitors:
            monitor.cancel()
        await asyncio.gather(*self._monitors, return_exceptions=True)
        for outbox in self._outboxes:
            outbox.close()
        self._inbox.close()
        self._context.term()

    def _bind(self, address: tuple[str, int]) -> zmq.asyncio.Socket:
        inbox = self._context.socket(zmq.PULL)
        inbox.setsockopt(zmq.RCVHWM, 0)
        inbox.setsockopt(zmq.LINGER, 0)
        host, port = address
        try:
            # ZeroMQ binds addresses, not names.
            inbox.bind(f"tcp://{socket.gethostbyname(host)}:{port}")
        except (OSError, zmq.ZMQError) as error:
            inbox.close()
            self._context.term()
            raise ValueError(
                f"inbox={host}:{port} cannot be bound ({error}): choose a free port of this host (cluster.port)"
            ) from None
        return inbox

    def _connect(self, address: tuple[str, int]) -> zmq.SyncSocket:
        outbox = self._plain.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.connect(f"tcp://{address[0]}:{address[1]}")
        return outbox

    async def _watch(self, rank: int, on_break: Callable[[int], None]) -> None:
        address = f"inproc://monitor-{id(self)}-{rank}-{time.monotonic_ns()}"
        self._outboxes[rank].monitor(address, zmq.EVENT_DISCONNECTED)
        events = self._context.socket(zmq.PAIR)
        try:
            events.connect(address)
            await events.recv_multipart()
        finally:
            events.close(linger=0)
        on_break(rank)
