"""Server-sent events come out the same however the bytes were cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.loadgen.sse import Event, SSEParser

STREAM = (
    '\ufeffdata: {"a":"größe 🤖"}\r\n\r\n: comment\n\ndata: one\ndata:two\n\n'
    "event: error\nid: 7\ndata: bad\r\rdata:\n\ndata: [DONE]\n\n"
).encode()
EVENTS = [
    Event('{"a":"größe 🤖"}'.encode()),
    Event(b"one\ntwo"),
    Event(b"bad", "error"),
    Event(b""),
    Event(b"[DONE]"),
]


def parse(parts: list[bytes]) -> list[Event]:
    parser = SSEParser()
    events = [event for part in parts for event in parser.feed(part)]
    return events + parser.finish()


def test_every_two_cuts_give_the_same_events() -> None:
    for first in range(len(STREAM)):
        for second in range(first, len(STREAM)):
            assert parse([STREAM[:first], STREAM[first:second], STREAM[second:]]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_any_cuts_give_the_same_events(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert parse([STREAM[a:b] for a, b in itertools.pairwise(edges)]) == EVENTS


def test_an_event_is_there_as_soon_as_its_empty_line_is() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: x\n") == []
    assert parser.feed(b"\ndata: y") == [Event(b"x")]


def test_the_end_of_the_stream_completes_the_last_event() -> None:
    assert parse([b"data: x\n\ndata: [DONE]"]) == [Event(b"x"), Event(b"[DONE]")]


@pytest.mark.parametrize("part", [b"data: " + b"x" * 40, b"data: 0123456789\n"])
def test_an_endless_event_is_refused(part: bytes) -> None:
    parser = SSEParser(max_event_bytes=100)
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        for _ in range(20):
            parser.feed(part)
