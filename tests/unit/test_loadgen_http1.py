"""Where an answer ends, and what was in it, however its bytes were cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.loadgen.http1 import ChunkWalk, Framing, FramingError, Walk, chunk_size, open_answer, parse_head
from toolkit.loadgen.receive import native

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
# Chunks that end as the last one does, an extension, a trailer.
PARTS = [b"data: 0\r\n\r\n", b"x" * 300, b"0\r\n\r\n", "größe".encode()]
BODY = b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in PARTS) + b"0\r\nTrailer: 1\r\n\r\n"
LENGTH = b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\nhello"


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, *(c % len(data) for c in cuts), len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def walks() -> list[Callable[[], Walk]]:
    """Both ways to find the end, or the one that this machine has."""
    compiled = native.library()
    return [ChunkWalk, *([functools.partial(native.NativeWalk, compiled)] if compiled else [])]


@pytest.mark.parametrize("walk", walks())
@given(cuts=st.lists(st.integers(0, 10_000), max_size=30))
def test_the_end_is_found_at_the_last_byte(walk: Callable[[], Walk], cuts: list[int]) -> None:
    for whole in (HEAD + BODY, LENGTH, b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + BODY):
        framing = Framing(walk)
        pieces = cut(whole, cuts)
        assert [framing.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert framing.reusable


@pytest.mark.parametrize("walk", walks())
@given(cuts=st.lists(st.integers(0, 10_000), max_size=30))
def test_settling_at_any_time_changes_nothing(walk: Callable[[], Walk], cuts: list[int]) -> None:
    framing = Framing(walk)
    for piece in cut(HEAD + BODY, cuts):
        assert not framing.complete
        framing.feed(piece)
        framing.settle()
    assert framing.complete


def test_the_body_is_what_was_sent() -> None:
    head, pieces = open_answer(HEAD + BODY)
    assert head is not None
    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
    assert [data for data, _ in pieces] == PARTS
    whole = HEAD + BODY
    assert [whole[end - len(data) : end] for data, end in pieces] == PARTS
    head, pieces = open_answer(LENGTH)
    assert head is not None
    assert (head.status, head.reason, pieces) == (503, "Busy", [(b"hello", len(LENGTH))])


@given(st.integers(0, len(HEAD + BODY) - 1))
def test_a_broken_answer_gives_what_came(end: int) -> None:
    head, pieces = open_answer((HEAD + BODY)[:end])
    assert (head is None) == (end < len(HEAD))
    assert b"".join(PARTS).startswith(b"".join(data for data, _ in pieces))


@pytest.mark.parametrize("walk", walks())
def test_a_connection_is_used_again_only_after_an_exact_end(walk: Callable[[], Walk]) -> None:
    extra, closing = Framing(walk), Framing(walk)
    extra.feed(HEAD + BODY + b"HTTP/1.1 ...\r\n\r\n")
    assert extra.complete
    assert not extra.reusable
    closing.feed(LENGTH.replace(b"Content", b"Connection: close\r\nContent"))
    assert closing.complete
    assert not closing.reusable
    until_close = Framing()
    assert not until_close.feed(b"HTTP/1.0 200 OK\r\n\r\nwhatever\r\n\r\n")


@pytest.mark.parametrize("walk", walks())
@pytest.mark.parametrize(
    "bad",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n", HEAD + b"zz\r\n\r\n", HEAD + b"-5\r\n\r\n", HEAD + b"\r\n\r\n",
        HEAD + b"5 5\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http_is_refused(walk: Callable[[], Walk], bad: bytes) -> None:
    with pytest.raises(FramingError):
        Framing(walk).feed(bad)
    with pytest.raises(FramingError):
        open_answer(bad)


@pytest.mark.parametrize("line", [b"5", b"00000000000000A", b"fF \t\r", b"5;name=value", b'5 ; x="0"'])
def test_sizes_of_chunks(line: bytes) -> None:
    size = int(line.partition(b";")[0], 16)
    for walk in walks():
        one = walk()
        one.feed(line + b"\n" + b"x" * size + b"\r\n0\r\n\r\n")
        assert one.ended
    assert chunk_size(line) == size


@pytest.mark.parametrize(
    "line",
    [
        b"0x5", b"1_0", b"+5", b"-5", b" 5", b"\t5", b"", b"\r", b";x", b"5x", b"5 5", b"5.0", b"0000000000000001",
        b"\x15", b"\xef\xbc\x95", "٥".encode(), b"5\x0b", b"5\x0c", b"5\x00",
    ],
)  # fmt: skip
def test_what_is_no_size_of_a_chunk(line: bytes) -> None:
    """Digits only: ``int`` takes more than HTTP does, and two readings of one answer are a hole."""
    for walk in walks():
        with pytest.raises(FramingError, match="size is"):
            walk().feed(line + b"\n" + b"x" * 20)
    with pytest.raises(FramingError, match="size is"):
        chunk_size(line)


def test_endless_heads_and_size_lines_are_refused() -> None:
    with pytest.raises(FramingError, match="head is longer"):
        Framing().feed(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000)
    for walk in walks():
        with pytest.raises(FramingError, match="no end"):
            walk().feed(b"0" * 5000)
        with pytest.raises(FramingError, match=r"size is b'zz\\r'"):
            walk().feed(b"zz\r\n")
    with pytest.raises(FramingError, match="Content-Length"):
        _ = parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: ten").length
