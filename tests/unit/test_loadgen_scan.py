"""``scan.c`` reads what ``answers.read_any`` reads, or says that it cannot: for any stream, cut anywhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.loadgen.answers import BLUR_NS, read_any
from toolkit.loadgen.exchange import TIMESPEC, Call, Exchange, Spool
from toolkit.loadgen.openai_api import Answer
from toolkit.loadgen.scan import Scanner, Seen, library

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
SENT_NS = 1_700_000_000_123_456_789


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close()


@pytest.fixture
def scanner(spool: Spool) -> Iterator[Scanner]:
    compiled = library()
    if compiled is None:
        pytest.skip("no C compiler")
    scanner = Scanner(compiled, spool, BLUR_NS)
    yield scanner
    scanner.close()


def exchange_of(raw: bytes, spool: Spool, cuts: list[int], spill: int = 5) -> Exchange:
    """An answer that came in reads cut at ``cuts``, some of which have one stamp, some of them read late."""
    exchange = Exchange(Call("r", "p", False, 0, 0, 0), SENT_NS)
    exchange.sent_ns = SENT_NS
    edges = sorted({0, *(cut % max(1, len(raw)) for cut in cuts), len(raw)})
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        kernel_ns = SENT_NS + 1_000_007 * (number - number % 3 // 2)
        exchange.reads.append(
            (kernel_ns + 900_000 * (number % 5), TIMESPEC.pack(kernel_ns // 10**9, kernel_ns % 10**9), raw[begin:end])
        )
        if number % spill == spill - 1:
            spool.put(exchange)
    spool.put(exchange)
    return exchange


def read_both(raw: bytes, cuts: list[int], spool: Spool, scanner: Scanner) -> Seen | None:
    """What C saw; where it saw anything, Python saw the same."""
    exchange, quick, careful = exchange_of(raw, spool, cuts), Answer(), Answer()
    seen, expected = scanner.scan(exchange, quick), read_any(exchange, spool.get(exchange), careful)
    if seen is None:
        assert str(vars(quick)) == str(vars(Answer()))  # text: NaN is not equal to itself
        return None
    ours, theirs = vars(quick), vars(careful)
    ours["texts"], theirs["texts"] = "".join(ours["texts"]), "".join(theirs["texts"])
    ours["_attributed"], ours["_seen"] = theirs["_attributed"], theirs["_seen"]  # of no use once all has been read
    assert str(ours) == str(theirs)
    assert (seen.head, seen.shared, seen.late, seen.fault) == (
        expected.head, expected.shared, expected.late, expected.fault,
    )  # fmt: skip
    assert (seen.kernel_ns == expected.kernel_ns).all()
    assert (seen.read_ns == expected.read_ns).all()
    return seen


def chunked(stream: bytes, cuts: list[int]) -> bytes:
    edges = sorted({0, *(cut % max(1, len(stream)) for cut in cuts), len(stream)})
    parts = [stream[begin:end] for begin, end in itertools.pairwise(edges)]
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


TEXT = st.none() | st.sampled_from(["", "a", " tok", 'say "x"\\n', "größe", "日本", "🤖", "\x00\t\u2028", "é\n"])
COUNT = st.integers(0, 12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
USAGE = st.fixed_dictionaries(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT},
    optional={
        "total_tokens": COUNT,
        "prompt_tokens_details": st.none() | st.fixed_dictionaries({}, optional={"cached_tokens": st.none() | COUNT}),
        "completion_tokens_details": st.none()
        | st.fixed_dictionaries({}, optional={"reasoning_tokens": st.none() | COUNT, "audio_tokens": JSON}),
    },
)
DELTA = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"), "content": TEXT, "reasoning_content": TEXT, "reasoning": TEXT,
        "tool_calls": st.none() | st.just([]) | st.just([{"function": {"name": "f"}}]),
    },
)  # fmt: skip
CHOICE = st.fixed_dictionaries(
    {"index": st.just(0)},
    optional={
        "delta": st.none() | DELTA, "text": TEXT, "finish_reason": st.sampled_from([None, "", "stop", "length"]),
        "logprobs": JSON,
    },
)  # fmt: skip
CHUNK = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=8), "choices": st.none() | st.lists(CHOICE, max_size=2), "usage": st.none() | USAGE,
        "error": st.none() | st.just({"message": "no"}), "extra": JSON,
    },
)  # fmt: skip
DAMAGE = [b"", b'"', b"\\", b"0", b"\r", b"\n", b"\xff", b"{", b",", b"e"]
CUTS = st.lists(st.integers(0, 5000), max_size=12)
quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    ascii_only, end = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n"]))
    separators = draw(st.sampled_from([None, (",", ":"), (" ,\t", " : ")]))
    lines = []
    for chunk in draw(st.lists(CHUNK, max_size=6)):
        lines += draw(st.sampled_from([[], [], [": ping", ""], [""]]))
        text = json.dumps(chunk, ensure_ascii=ascii_only, separators=separators)
        lines += [draw(st.sampled_from(["data: ", "data:"])) + text, ""]
    lines += draw(st.sampled_from([["data: [DONE]", ""], ["data: [DONE]", ""], []]))
    return "".join(line + end for line in lines).encode("utf-8", "surrogatepass")


@quiet
@given(stream=streams(), cuts=CUTS, parts=CUTS, framed=st.booleans())
def test_what_c_reads_python_reads_too(
    stream: bytes, cuts: list[int], parts: list[int], framed: bool, spool: Spool, scanner: Scanner
) -> None:
    read_both(chunked(stream, parts) if framed else HEAD + b"\r\n" + stream, cuts, spool, scanner)


@quiet
@given(stream=streams(), cuts=CUTS, parts=CUTS, data=st.data())
def test_of_what_is_damaged_too(
    stream: bytes, cuts: list[int], parts: list[int], data: st.DataObject, spool: Spool, scanner: Scanner
) -> None:
    raw = bytearray(chunked(stream, parts))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(DAMAGE))
    read_both(bytes(raw), cuts, spool, scanner)


def delta(content: str, usage: int | None = None, **more: Any) -> bytes:
    chunk: dict[str, Any] = {"id": "x", "choices": [{"index": 0, "delta": {"content": content}, **more}]}
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": usage, "prompt_tokens_details": None}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@pytest.mark.parametrize(
    "stream",
    [
        delta("", usage=0) + delta("a", usage=1) + delta("bc 🤖", usage=3, finish_reason="length") + DONE,
        delta("a") + b": ping\n\n" + delta("b", finish_reason="stop"),
        delta("größe").replace(b"\n", b"\r\n") + b"data:[DONE]\r\n\r\n",
        delta("a", logprobs={"content": [{"token": "a", "logprob": -1.5e-3, "top_logprobs": []}]}) + DONE,
    ],
)
def test_regular_streams_are_read_by_c(stream: bytes, spool: Spool, scanner: Scanner) -> None:
    for raw in (HEAD + b"\r\n" + stream, chunked(stream, []), chunked(stream, [3, 40, 41, 90])):
        assert read_both(raw, list(range(0, 2000, 37)), spool, scanner) is not None


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {} \x0b\n\n", b"data: {\"usage\": {\"prompt_tokens\": 01}}\n\n", b"data: {\"a\": 1.}\n\n",
        b"data: {\"a\": .5}\n\n", b"data: {\"a\": +1}\n\n", b"data: {\"a\": NaN}\n\n", b"data: {\"a\": 1,}\n\n",
        b"data: {\"a\" 1}\n\n", b"data: {\"a\": \"\\x\"}\n\n", b"data: {\"a\": \"\\u12g4\"}\n\n",
        b"data: {\"choices\": [{\"text\": \"\xc3\"}]}\n\n", b"data: {\"choices\": [{\"text\": \"\\ud800\"}]}\n\n",
        b"data: {\"id\": \"\\ud800\", \"choices\": []}\n\n", b"data: {\"id\": \"\\ud800\\u0041\"}\n\n",
        b"data: {\"choices\": [{\"text\": 5}]}\n\n", b"data: {\"usage\": {\"completion_tokens\": -1}}\n\n",
        b"data: {\"usage\": {\"completion_tokens\": 1.5}}\n\n", b"data: {\"usage\": 1}\n\n", b"data: {}\n",
        b"data: {\"choices\": {}}\n\n", b"data: {\"error\": \"x\"}\n\n", b"event: error\ndata: {}\n\n",
        b"data: {}\ndata: {}\n\n", b": a\rdata: {\"error\": 1}\n\n",
        b"data: {\"a\": " + b"[" * 500 + b"]" * 500 + b"}\n\n",
        b"data: {\"ch\\u006fices\": []}\n\n", b"data: []\n\n", b"data: {\"usage\": null, \"usage\": null}\n\n",
        b"data: [DONE]\n\ndata: {}\n\n", b"\xef\xbb\xbfdata: {}\n\n", b"data: {}x\n\n", b"data\n\n", b"data: \n\n",
    ],
)  # fmt: skip
def test_anything_else_is_left_to_python(bad: bytes, spool: Spool, scanner: Scanner) -> None:
    assert read_both(chunked(bad, []), [], spool, scanner) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"", CHUNKED[:-1], CHUNKED, CHUNKED + b"5\r\ndata:", CHUNKED.replace(b"200", b"503") + b"0\r\n\r\n",
        chunked(DONE, [])[:-9], chunked(DONE, []).replace(b"e\r\n", b"0xe\r\n"),
        chunked(DONE, []).replace(b"e\r\n", b"+e\r\n"), chunked(DONE, []).replace(b"e\r\n", b"d\r\n"),
        chunked(DONE, []).replace(b"text/event-stream", b"application/json"), b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + chunked(DONE, []),
    ],
)  # fmt: skip
def test_other_answers_are_left_to_python(raw: bytes, spool: Spool, scanner: Scanner) -> None:
    assert read_both(raw, [], spool, scanner) is None
