"""One request against a real server that behaves well, badly or not at all: exactly one row, and a true one.

Every test runs over both transports, the own one with its compiled parts and without: they must not differ in what
they report.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
from collections.abc import Iterator

import pytest

from tests.unit.loadgen_server import (
    DONE,
    ROLE,
    Behaviour,
    ScriptedServer,
    call,
    closed_loop,
    delta,
    event,
    fetch,
    hang,
    measure,
    reply,
    setup,
    stream,
    tokens,
)
from toolkit.loadgen import answers
from toolkit.loadgen.receive import native
from toolkit.records.requests import RequestRecord


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer().running() as running:
        yield running


@pytest.fixture(params=["socket, compiled", "socket, Python", "aiohttp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, reader = str(request.param).partition(", ")
    if reader == "Python":
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(answers, "library", lambda: None)
    elif reader and native.library() is None:
        pytest.skip("no C compiler")
    return name


def one(server: ScriptedServer, behaviour: Behaviour, transport: str, timeout_s: float = 20.0) -> RequestRecord:
    server.behaviours = [behaviour]
    (record,) = fetch(server.url, timeout_s=timeout_s, transport=transport)
    return record


def test_a_good_answer(server: ScriptedServer, transport: str) -> None:
    words = [delta("He", usage=1), delta("llo", usage=2), delta("!", usage=3, finish="length")]
    record = one(server, stream(ROLE, *words, DONE, headers={"x-dp-rank": "3"}), transport)
    assert (record.status, record.error, record.http_status) == ("ok", "", 200)
    assert (record.output_text, record.finish_reason, record.dp_rank) == ("Hello!", "length", 3)
    assert (record.output_tokens, record.prompt_tokens, record.chunk_tokens) == (3, 7, [1, 1, 1])
    assert record.request_id == "r0" == server.headers[0]["x-request-id"]
    assert record.prompt_id == "p0"
    assert record.scheduled_s <= 0 < record.first_byte_s <= record.first_token_s
    assert record.chunk_s == sorted(record.chunk_s)
    assert [record.first_token_s, record.last_token_s] == [record.chunk_s[0], record.chunk_s[-1]]
    assert record.last_token_s <= record.end_s


def test_the_first_token_is_not_the_role(server: ScriptedServer, transport: str) -> None:
    record = one(server, stream(ROLE, delta("a", finish="stop"), DONE, gap_s=0.1), transport)
    assert record.first_token_s - record.first_byte_s >= 0.09  # the server waits 0.1 s between the two
    assert len(record.chunk_s) == 1


def test_the_end_is_not_the_last_token(server: ScriptedServer, transport: str) -> None:
    record = one(server, stream(delta("a", usage=1, finish="stop"), event({"choices": []}), DONE, gap_s=0.1), transport)
    assert record.end_s - record.last_token_s >= 0.09


def test_characters_and_events_may_be_cut_anywhere(server: ScriptedServer, transport: str) -> None:
    text = "größe 🤖 日本"
    data = delta(text, usage=4, finish="stop") + DONE.replace(b"\n", b"\r\n")
    record = one(server, stream(*(data[i : i + 7] for i in range(0, len(data), 7)), gap_s=0.001), transport)
    assert (record.status, record.output_text, record.chunk_tokens) == ("ok", text, [4])


def test_a_finish_reason_without_done_is_an_end(server: ScriptedServer, transport: str) -> None:
    assert one(server, stream(delta("a", finish="stop")), transport).status == "ok"


@pytest.mark.parametrize(
    ("behaviour", "http_status", "reason"),
    [
        (reply(503, '{"error": {"message": "queue is full"}}'), 503, "HTTP 503: queue is full"),
        (reply(404, "nothing here", "text/plain"), 404, "HTTP 404: nothing here"),
        (reply(307, ""), 307, "HTTP 307: Temporary Redirect"),
        (reply(200, "<html>login</html>", "text/html"), 200, "content type text/html .*login"),
        (reply(200, '{"choices": []}'), 200, "content type application/json"),
        (stream(delta("a"), b"data: {broken\n\n"), 200, "malformed event .*broken"),
        (stream(delta("a"), event({"error": {"message": "rank 3 died"}})), 200, "rank 3 died"),
        (stream(delta("a"), delta("", finish="abort"), DONE), 200, "finish_reason=abort"),
        (stream(delta("a")), 200, "without a finish reason"),
        (stream(DONE), 200, "no token"),
        (stream(delta("a"), reset=True), 200, "connection broke|reset|disconnected|closed"),
        (stream(reset=True), 200, "connection broke|reset|disconnected|closed"),
    ],
)
def test_failures_have_a_row_that_says_why(
    server: ScriptedServer, transport: str, behaviour: Behaviour, http_status: int, reason: str
) -> None:
    record = one(server, behaviour, transport)
    assert (record.status, record.http_status) == ("error", http_status)
    assert re.search(reason, record.error), record.error
    assert len(record.error) <= 500
    assert record.end_s > 0


def test_a_broken_stream_keeps_what_came(server: ScriptedServer, transport: str) -> None:
    record = one(server, stream(ROLE, delta("a", usage=1), delta("b", usage=2), reset=True), transport)
    assert (record.status, record.output_text, record.output_tokens) == ("error", "ab", 2)
    assert len(record.chunk_s) == 2
    assert record.first_token_s == record.chunk_s[0]


@pytest.mark.parametrize("behaviour", [hang, stream(delta("a"), *[b": ping\n\n"] * 400)])
def test_a_request_that_takes_too_long(server: ScriptedServer, transport: str, behaviour: Behaviour) -> None:
    record = one(server, behaviour, transport, timeout_s=0.3)
    assert (record.status, record.error) == ("timeout", "no complete answer after timeout_s=0.3")


def test_nobody_listens(transport: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        (record,) = fetch(f"http://127.0.0.1:{bound.getsockname()[1]}", transport=transport)
    assert (record.status, record.http_status) == ("error", 0)
    assert "Cannot connect" in record.error
    assert math.isnan(record.first_token_s)
    assert record.t_send > 1e9


def test_after_a_failure_the_next_request_is_fine(server: ScriptedServer, transport: str) -> None:
    bad = [reply(503, "{}"), stream(delta("a"), reset=True), stream(b"data: {\n\n"), tokens()]
    server.behaviours = bad
    assert [record.status for record in fetch(server.url, count=6, transport=transport)] == ["error"] * 3 + ["ok"] * 3


def test_connections_are_kept(server: ScriptedServer, transport: str) -> None:
    server.behaviours = [tokens(2, gap_s=0.001)]
    records = fetch(server.url, count=40, concurrency=4, transport=transport)
    assert [record.status for record in records] == ["ok"] * 40
    assert len(server.connections) == 4


def test_more_than_a_hundred_at_a_time(server: ScriptedServer, transport: str) -> None:
    server.behaviours = [tokens(2, gap_s=0.2)]
    records = fetch(server.url, count=130, concurrency=130, transport=transport)
    assert len(records) == 130
    assert max(server.open_at_arrival) == 130


def test_an_interrupted_request_has_a_row(server: ScriptedServer, transport: str) -> None:
    server.behaviours = [stream(delta("a", usage=1), *[b": ping\n\n"] * 4000)]

    async def run() -> list[RequestRecord]:
        task = asyncio.create_task(measure(setup(server.url, transport), [call(0)], closed_loop(1)))
        while not server.bodies:  # noqa: ASYNC110  the client has no event for it
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        task.cancel()
        return (await task).records

    assert [(record.status, record.output_text) for record in asyncio.run(run())] == [("interrupted", "a")]


def test_the_key_is_sent_and_nowhere_else(
    server: ScriptedServer, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADGEN_TEST_KEY", "sesame")
    settings = setup(server.url, transport, api_key_env="LOADGEN_TEST_KEY")
    (record,) = asyncio.run(measure(settings, [call(0)], closed_loop(1))).records
    assert server.headers[0]["authorization"] == "Bearer sesame"
    assert "sesame" not in repr(record) + repr(settings)


def test_a_connection_closed_while_idle_costs_no_request() -> None:
    """The server closes each connection when a second request comes on it, before it says a word."""
    answer = stream_bytes(delta("a", usage=1, finish="length"), DONE)
    served: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for attempt in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.findall(rb"Content-Length: (\d+)", head)[0]))
            if attempt == 0:
                served.append(1)
                writer.write(answer)
        writer.close()

    async def run() -> list[RequestRecord]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            return (await measure(setup(url), [call(n) for n in range(4)], closed_loop(1))).records

    records = asyncio.run(run())
    assert [(record.status, record.resent) for record in records] == [("ok", 0), ("ok", 1), ("ok", 1), ("ok", 1)]
    assert len(served) == 4, "each request was answered once"


def stream_bytes(*events: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in events)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + body + b"0\r\n\r\n"


def test_reasoning_and_tool_calls_are_output(server: ScriptedServer, transport: str) -> None:
    parts = [
        ROLE,
        delta(None, usage=1, reasoning_content="hm"),
        delta("yes", usage=2),
        delta(None, usage=3, tool_calls=[{"index": 0}], finish="tool_calls"),
        event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3,
                                        "completion_tokens_details": {"reasoning_tokens": 1}}}),
        DONE,
    ]  # fmt: skip
    record = one(server, stream(*parts, gap_s=0.05), transport)
    assert (record.status, record.chunk_tokens, record.output_text) == ("ok", [1, 1, 1], "hmyes")
    assert (record.reasoning_tokens, record.token_source) == (1, "usage")
    assert record.first_visible_s == record.chunk_s[1] > record.first_token_s


def test_events_of_one_read_are_counted_as_such(server: ScriptedServer, transport: str) -> None:
    together = delta("a", usage=1) + delta("b", usage=2) + delta("c", usage=3, finish="stop")
    record = one(server, stream(ROLE, together, DONE), transport)
    assert (record.chunk_tokens, record.coalesced) == ([3], 2)


def test_a_pause_that_was_asked_for_is_no_lack_of_concurrency(server: ScriptedServer) -> None:
    """Of 1.5 s, all but some ms are pauses between turns: the conversation holds its slot meanwhile."""
    turns = [call(turn, session="one", turn=turn, more_turns=turn < 3, think_s=0.5) for turn in range(4)]
    with asyncio.Runner() as runner:
        result = runner.run(measure(setup(server.url), turns, closed_loop(1)))
    assert [record.status for record in result.records] == ["ok"] * 4
    assert result.evidence.in_flight_s > 0.5 * result.evidence.asked_s > 0
