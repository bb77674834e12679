"""Server-sent events from the bytes of a stream, however they were cut.

Knows the framing only (WHATWG HTML, "Server-sent events"): not HTTP, not what the events mean (openai_api.py).
Works on bytes until an event is whole, so that a character split between two reads is never an issue.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_END_OF_LINE = re.compile(rb"\r\n|\n|\r")


class Event(NamedTuple):
    """One event: its ``data`` lines joined by newlines, and its type."""

    data: bytes
    type: str = "message"


class SSEParser:
    """Incremental parser: ``feed`` it what was read, in order; ``finish`` when the stream has ended.

    Args:
        max_event_bytes: a longer event is refused with ``ValueError``, so that a server gone wrong cannot fill memory.
    """

    def __init__(self, max_event_bytes: int = 16 << 20) -> None:
        self.max_event_bytes = max_event_bytes
        self._rest = b""  # the line that has not ended yet
        self._data: list[bytes] = []
        self._type = ""
        self._first_line = True

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that ``chunk`` completed."""
        if (
            chunk.startswith(b"data: ")
            and chunk.endswith(b"\n\n")
            and chunk.find(b"\n") == len(chunk) - 2
            and not (self._rest or self._data or self._type)
            and b"\r" not in chunk
        ):  # one event, as nearly all reads are: the regular way takes three times as long
            self._first_line = False
            return [Event(chunk[6:-2])]
        text = self._rest + chunk
        end = len(text) - text.endswith(b"\r")  # a last \r may be the first half of \r\n: decided by the next read
        *lines, rest = _END_OF_LINE.split(text[:end])
        self._rest = rest + text[end:]
        events = [event for line in lines if (event := self._take(line)) is not None]
        if len(self._rest) + sum(map(len, self._data)) > self.max_event_bytes:
            raise ValueError(f"an event of the stream is longer than {self.max_event_bytes} bytes")
        return events

    def finish(self) -> list[Event]:
        """The event that the stream's end completes: some servers leave out the last empty line."""
        events = [self._take(line) for line in (self._rest.rstrip(b"\r"), b"")]
        self._rest = b""
        return [event for event in events if event is not None]

    def _take(self, line: bytes) -> Event | None:
        if self._first_line:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._first_line = False
        if not line:
            event = Event(b"\n".join(self._data), self._type or "message") if self._data else None
            self._data, self._type = [], ""
            return event
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._type = value.decode(errors="replace")
        return None  # comments (empty name), id and retry mean nothing here
