"""Just enough of HTTP/1.1 to know where an answer ends, and afterwards what was in it.

Knows bytes only: no sockets, no clocks, no events (sse.py). ``Framing`` runs while latencies are taken and therefore
looks at as little as it can; ``open_answer`` runs afterwards. Read next: ``sockets.py``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

HEAD_END = b"\r\n\r\n"
MAX_HEAD = 1 << 16
MAX_SIZE_LINE = 1 << 12
HEADS_KEPT = 64  # many answers of a server have one head, but for the second in it
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t\r]*(?:;.*)?", re.DOTALL)
EVENT_STREAM = "text/event-stream"


class FramingError(ValueError):
    """What came is not HTTP/1.1."""


@dataclass(frozen=True)
class Head:
    """Status line and headers of an answer; header names are lower case, of repeated ones the last counts."""

    status: int
    reason: str
    headers: dict[str, str]

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def length(self) -> int | None:
        """Bytes of the body; None: chunked, or as long as the connection lives."""
        if self.chunked:
            return None
        if self.status in (204, 304):
            return 0
        text = self.headers.get("content-length")
        if text is not None and not (text.isascii() and text.isdigit()):
            raise FramingError(f"Content-Length is {text[:40]!r}")
        return None if text is None else int(text)

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def keeps_alive(self) -> bool:
        return "close" not in self.headers.get("connection", "").lower()


@functools.lru_cache(HEADS_KEPT)
def parse_head(head: bytes) -> Head:
    """The bytes before the empty line. Raises ``FramingError``."""
    lines = head.decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    status, _, reason = rest.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or len(status) != 3 or not status.isdigit():
        raise FramingError(f"no HTTP answer: {lines[0][:80]!r}")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return Head(int(status), reason, headers)


class Walk(Protocol):
    """Steps over the chunks of a chunked body, however its bytes are cut, to find where the body ends."""

    @property
    def ended(self) -> bool:
        """The last chunk and the trailers after it have come."""
        ...

    @property
    def extra(self) -> int:
        """Bytes that follow the end."""
        ...

    def feed(self, data: bytes) -> None:
        """Raises ``FramingError`` when a chunk's size is not a number, or its line has no end."""
        ...


class ChunkWalk:
    """``Walk`` in Python; ``receive/native.py`` has one in C."""

    def __init__(self) -> None:
        self.ended = False
        self.extra = 0
        self._skip = 0  # bytes until the next size line: of the chunk's data and the line end behind it
        self._rest = b""  # of a size line, or of the trailers, that is not whole
        self._trailers = False

    def feed(self, data: bytes) -> None:
        at, size = 0, len(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
            size = len(data)
        while not self.ended:
            at += self._skip
            if at >= size:
                self._skip = at - size
                return
            self._skip = 0
            if self._trailers:
                at = self._end(data, at)
                continue
            stop = data.find(b"\n", at)
            if stop < 0:
                self._keep(data[at:])
                return
            length = chunk_size(data[at:stop])
            at = stop + 1
            if length:
                self._skip = length + 2
            else:
                self._trailers = True
        self.extra += size - at

    def _end(self, data: bytes, at: int) -> int:
        """One line of the trailers; the empty one is the end."""
        stop = data.find(b"\n", at)
        if stop < 0:
            self._keep(data[at:])
            return len(data)
        self.ended = not data[at:stop].strip()
        return stop + 1

    def _keep(self, rest: bytes) -> None:
        if len(rest) > MAX_SIZE_LINE:
            raise FramingError("a chunk's size line has no end")
        self._rest = rest


def chunk_size(line: bytes) -> int:
    """The number in a chunk's size line, without its line feed: hexadecimal digits and nothing else that ``int`` takes,
    white space, and whatever extension follows a semicolon."""
    if (found := _SIZE_LINE.fullmatch(line)) is not None:
        return int(found[1], 16)
    raise FramingError(f"a chunk's size is {line[:40]!r}")


class Framing:
    """Tells when an answer is complete, reading as little of it as possible.

    ``feed`` gets every read. A chunked body is only looked at when a read ends in an empty line, as the last one must,
    or when ``settle`` says that the bytes so far are about to leave memory.
    """

    def __init__(self, make_walk: Callable[[], Walk] = ChunkWalk) -> None:
        self.head: Head | None = None
        self._make_walk = make_walk
        self.complete = False
        self._start = b""
        self._left: int | None = None  # body bytes to come, where the head says how many
        self._walk: Walk | None = None
        self._unwalked: list[bytes] = []

    def feed(self, data: bytes) -> bool:
        """True when the answer is complete. Raises ``FramingError``."""
        if self.head is None:
            data = self._take_head(data)
            if self.head is None:
                return False
        if self._walk is not None:
            self._unwalked.append(data)
            if data[-4:] == HEAD_END or len(data) < 4:
                self.settle()
        elif self._left is not None:
            self._left -= len(data)
            self.complete = self._left <= 0
        return self.complete

    def settle(self) -> None:
        """Looks at everything that has come."""
        if self._walk is not None and self._unwalked:
            self._walk.feed(b"".join(self._unwalked))
            self._unwalked.clear()
            self.complete = self._walk.ended

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on the connection: the answer ended exactly, and it may stay open."""
        extra = self._walk.extra if self._walk is not None else -(self._left or 0)
        return self.complete and not extra and self.head is not None and self.head.keeps_alive

    def _take_head(self, data: bytes) -> bytes:
        """Returns what of the body came with it."""
        self._start += data
        while (end := self._start.find(HEAD_END)) >= 0:
            head, rest = parse_head(self._start[:end]), self._start[end + 4 :]
            self._start = rest
            if head.status < 200:
                continue  # 100 Continue and the like: the answer is still to come
            self.head, self._left = head, head.length
            if head.chunked:
                self._walk = self._make_walk()
            return rest
        if len(self._start) > MAX_HEAD:
            raise FramingError(f"the answer's head is longer than {MAX_HEAD} bytes")
        return b""


def open_answer(raw: bytes) -> tuple[Head | None, list[tuple[bytes, int]]]:
    """A whole or broken answer -> its head and the pieces of its body, each with where in ``raw`` it ended.

    The head is None where it did not come whole. A piece is a chunk, a part of one at a broken end, or everything.

    Raises:
        FramingError: it is not HTTP, or a chunk's size is not a number.
    """
    at = 0
    while (end := raw.find(HEAD_END, at)) >= 0:
        head, at = parse_head(raw[at:end]), end + 4
        if head.status >= 200:
            return head, _chunks(raw, at) if head.chunked else [(raw[at:], len(raw))]
    return None, []


def _chunks(raw: bytes, at: int) -> list[tuple[bytes, int]]:
    pieces = []
    find, total = raw.find, len(raw)
    while (stop := find(b"\n", at)) >= 0:
        size = chunk_size(raw[at:stop])
        if not size:
            break
        at = stop + 1
        end = min(at + size, total)
        pieces.append((raw[at:end], end))
        at += size + 2
        if at > total:
            break
    return pieces
