"""How bytes get from sockets to the spool, with the kernel's time of each read: the inner loop of the load generator.

Two ways with one behaviour: ``native.py`` reads all sockets in one call of a compiled function, ``python.py`` does the
same where there is no C compiler. Neither knows more of HTTP than what a chunk is: a connection is told of reads that
may matter to it (``Watcher.noticed``), all others are only kept. A read that returns several packets has the stamp of
the last.

Read next: ``poller.py``, which decides when to read, and ``sockets.py``, whose connections are told.
"""

from __future__ import annotations

import select
import socket
from typing import Protocol

from toolkit.loadgen.exchange import Exchange, Spool
from toolkit.loadgen.http1 import Walk

READ_BYTES = 1 << 14
SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module does not name it
DONE_LINE = b"\ndata: [DONE]"
END_OF_STREAM = "the end of the stream"  # how a connection is gone that the peer closed


class Watcher(Protocol):
    """A connection."""

    def noticed(self, data: bytes, gone: str) -> None:
        """What came since the last notice; ``gone``: the connection has ended, and how, else empty."""
        ...


class Inbox(Protocol):
    """One socket's end of a receiver."""

    def loud(self, every_read: bool) -> None:
        """Whether every read is noticed (as in the beginning), or only one that may end a chunked answer, that has
        ``DONE_LINE`` in it, or after which more is held than should stay in memory."""
        ...

    def store(self, exchange: Exchange) -> None:
        """Moves what has come since the last time into the spool, as the exchange's."""
        ...

    def stop(self) -> None:
        """The socket is about to be closed; what has come can still be stored."""
        ...

    def free(self) -> None:
        """After ``stop``: nothing will be stored any more."""
        ...


class Receiver(Protocol):
    """Reads every socket it was given.

    Attributes:
        epoll: readable when a socket is.
        reads: reads that brought bytes so far.
    """

    epoll: select.epoll

    @property
    def reads(self) -> int: ...

    def add(self, sock: socket.socket, watcher: Watcher) -> Inbox: ...

    def make_walk(self) -> Walk:
        """What finds the end of a chunked answer."""
        ...

    def drain(self) -> int:
        """Reads once from every socket that has something; returns how many had."""
        ...

    def close(self) -> None: ...


def make_receiver(spool: Spool) -> Receiver:
    """The compiled one where it can be had."""
    from toolkit.loadgen.receive.native import NativeReceiver, library

    if (compiled := library()) is not None:
        return NativeReceiver(compiled, spool)
    from toolkit.loadgen.receive.python import PythonReceiver

    return PythonReceiver(spool)
