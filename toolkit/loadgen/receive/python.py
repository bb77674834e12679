"""``Receiver`` in Python: for machines without a C compiler, and the reference of ``receive.c``."""

from __future__ import annotations

import os
import select
import socket
from time import time_ns

from toolkit.loadgen.exchange import SPILL_BYTES, TIMESPEC, Exchange, Spool
from toolkit.loadgen.http1 import ChunkWalk, Walk
from toolkit.loadgen.receive import DONE_LINE, END_OF_STREAM, READ_BYTES, Watcher
from toolkit.loadgen.receive.stamps import ANCILLARY_BYTES


class PythonReceiver:
    """See ``Receiver``."""

    def __init__(self, spool: Spool) -> None:
        self.epoll = select.epoll()
        self.reads = 0
        self.spool = spool
        self._inboxes: dict[int, PythonInbox] = {}

    def add(self, sock: socket.socket, watcher: Watcher) -> PythonInbox:
        inbox = PythonInbox(self, sock, watcher)
        self.epoll.register(sock.fileno(), select.EPOLLIN)
        self._inboxes[sock.fileno()] = inbox
        return inbox

    def remove(self, fd: int) -> None:
        self.epoll.unregister(fd)
        del self._inboxes[fd]

    def make_walk(self) -> Walk:
        return ChunkWalk()

    def drain(self) -> int:
        events = self.epoll.poll(0)
        for fd, _ in events:
            inbox = self._inboxes.get(fd)
            if inbox is not None:  # else one before it in the list has closed it
                inbox.read()
        return len(events)

    def close(self) -> None:
        self.epoll.close()


class PythonInbox:
    """See ``Inbox``."""

    __slots__ = ("_held", "_loud", "_reads", "_receiver", "_recvmsg", "_sock", "_stamped", "_told", "_watcher")

    def __init__(self, receiver: PythonReceiver, sock: socket.socket, watcher: Watcher) -> None:
        self._receiver = receiver
        self._sock = sock
        self._recvmsg = sock.recvmsg
        self._watcher = watcher
        self._loud = True
        self._reads: list[tuple[int, bytes, bytes]] = []
        self._held = 0
        self._told = 0  # reads that were noticed
        self._stamped = True

    def loud(self, every_read: bool) -> None:
        self._loud = every_read

    def read(self) -> None:
        try:
            data, ancillary, _, _ = self._recvmsg(READ_BYTES, ANCILLARY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._tell(os.strerror(error.errno or 0))
            return
        now = time_ns()
        if not data:
            self._tell(END_OF_STREAM)
            return
        self._receiver.reads += 1
        if ancillary:
            self._reads.append((now, ancillary[0][2], data))
        else:
            self._reads.append((now, TIMESPEC.pack(now // 1_000_000_000, now % 1_000_000_000), data))
            self._stamped = False
        self._held += len(data)
        if (
            self._loud
            or len(data) < 4
            or data[-4:] == b"\r\n\r\n"
            or self._held > SPILL_BYTES
            or DONE_LINE in data
        ):  # fmt: skip
            self._tell("")

    def store(self, exchange: Exchange) -> None:
        exchange.kernel_stamped &= self._stamped
        exchange.reads += self._reads
        self._receiver.spool.put(exchange)
        self._reads, self._held, self._told, self._stamped = [], 0, 0, True

    def stop(self) -> None:
        self._receiver.remove(self._sock.fileno())

    def free(self) -> None:
        self._reads = []

    def _tell(self, gone: str) -> None:
        new = b"".join([data for _, _, data in self._reads[self._told :]])
        self._told = len(self._reads)
        self._watcher.noticed(new, gone)
