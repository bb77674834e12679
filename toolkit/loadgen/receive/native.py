"""``Receiver`` over ``receive.c``: one call reads every socket that has something.

ctypes, since the file is compiled on the machine itself: no headers of Python are needed for it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import socket
from pathlib import Path

from toolkit.loadgen.compiled import Signatures, load
from toolkit.loadgen.exchange import SPILL_BYTES, Exchange, Spool
from toolkit.loadgen.http1 import MAX_SIZE_LINE, FramingError
from toolkit.loadgen.receive import END_OF_STREAM, READ_BYTES, Watcher

SOURCE = Path(__file__).with_name("receive.c")
PEER_CLOSED = -1  # struct notice's error


class Notice(ctypes.Structure):
    """``struct notice``."""

    _fields_ = (
        ("line", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
    )


class Spooled(ctypes.Structure):
    """``struct spooled``."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("reads", ctypes.c_int64),
        ("last_ns", ctypes.c_int64),
        ("unstamped", ctypes.c_int32),
    )


class WalkState(ctypes.Structure):
    """``struct walk``."""

    _fields_ = (
        ("skip", ctypes.c_int64),
        ("extra", ctypes.c_int64),
        ("trailers", ctypes.c_int32),
        ("ended", ctypes.c_int32),
        ("kept", ctypes.c_int32),
        ("line", ctypes.c_char * MAX_SIZE_LINE),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """``receive.c``, compiled; None where it cannot be."""
    reader, number, pointer = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER
    signatures: Signatures = {
        "reader_new": (reader, number, ctypes.c_size_t, ctypes.c_size_t),
        "reader_delete": (None, reader),
        "reader_reads": (ctypes.c_uint64, reader),
        "reader_notices": (pointer(Notice), reader),
        "reader_add": (number, reader, number),
        "reader_stop": (None, reader, number),
        "reader_free": (None, reader, number),
        "reader_loud": (None, reader, number, number),
        "reader_drain": (number, reader, pointer(number)),
        "reader_spool": (number, reader, number, number, pointer(Spooled)),
        "walk_feed": (number, pointer(WalkState), ctypes.c_char_p, ctypes.c_int64),
    }
    return load(SOURCE, signatures)


class NativeReceiver:
    """See ``Receiver``."""

    def __init__(self, lib: ctypes.CDLL, spool: Spool) -> None:
        self.epoll = select.epoll()
        self.spool = spool
        self.lib = lib
        self.reader = lib.reader_new(self.epoll.fileno(), READ_BYTES, SPILL_BYTES)
        if not self.reader:
            raise MemoryError("no memory for the receiver")
        self._notices = lib.reader_notices(self.reader)
        self._told = ctypes.c_int()
        self._told_at = ctypes.byref(self._told)
        self._watchers: dict[int, Watcher] = {}

    @property
    def reads(self) -> int:
        return int(self.lib.reader_reads(self.reader)) if self.reader else 0

    def add(self, sock: socket.socket, watcher: Watcher) -> NativeInbox:
        line = self.lib.reader_add(self.reader, sock.fileno())
        if line < 0:
            raise OSError(-line, os.strerror(-line))
        self._watchers[line] = watcher
        return NativeInbox(self, line)

    def remove(self, line: int) -> None:
        self.lib.reader_stop(self.reader, line)
        del self._watchers[line]

    def make_walk(self) -> NativeWalk:
        return NativeWalk(self.lib)

    def drain(self) -> int:
        count: int = self.lib.reader_drain(self.reader, self._told_at)
        notices = self._notices
        for i in range(self._told.value):
            notice = notices[i]
            watcher = self._watchers.get(notice.line)
            if watcher is None:  # one before it in the list has closed it
                continue
            error: int = notice.error
            gone = "" if not error else END_OF_STREAM if error == PEER_CLOSED else os.strerror(error)
            watcher.noticed(ctypes.string_at(notice.data, notice.size) if notice.size else b"", gone)
        return count

    def close(self) -> None:
        if self.reader:
            self.lib.reader_delete(self.reader)
            self.reader = None
        self.epoll.close()


class NativeInbox:
    """See ``Inbox``."""

    __slots__ = ("_line", "_receiver")

    def __init__(self, receiver: NativeReceiver, line: int) -> None:
        self._receiver = receiver
        self._line = line

    def loud(self, every_read: bool) -> None:
        self._receiver.lib.reader_loud(self._receiver.reader, self._line, every_read)

    def store(self, exchange: Exchange) -> None:
        receiver, spooled = self._receiver, Spooled()
        error = receiver.lib.reader_spool(receiver.reader, self._line, receiver.spool.fd, ctypes.byref(spooled))
        if error:
            raise OSError(error, f"answers cannot be written to the temporary folder: {os.strerror(error)}")
        if spooled.reads:
            receiver.spool.wrote(exchange, spooled.size, spooled.reads)
            exchange.last_read_ns = spooled.last_ns
        exchange.kernel_stamped &= not spooled.unstamped

    def stop(self) -> None:
        self._receiver.remove(self._line)

    def free(self) -> None:
        if self._receiver.reader:
            self._receiver.lib.reader_free(self._receiver.reader, self._line)


class NativeWalk:
    """See ``http1.Walk``."""

    __slots__ = ("_feed", "_state")

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._feed = lib.walk_feed
        self._state = WalkState()

    @property
    def ended(self) -> bool:
        return bool(self._state.ended)

    @property
    def extra(self) -> int:
        return int(self._state.extra)

    def feed(self, data: bytes) -> None:
        failed = self._feed(self._state, data, len(data))
        if failed == 1:
            raise FramingError(f"a chunk's size is {bytes(self._state.line[: self._state.kept])!r}")
        if failed:
            raise FramingError("a chunk's size line has no end")
