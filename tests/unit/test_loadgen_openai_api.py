"""Which events carry tokens, how many, and what is not a usable answer."""

from __future__ import annotations

import json

import pytest

from tests.unit.loadgen_server import DONE, ROLE, delta, event
from toolkit.config.load import LoadConfig
from toolkit.loadgen.datasets import Sample
from toolkit.loadgen.openai_api import Answer, AnswerError, encode_body, error_message
from toolkit.loadgen.sse import SSEParser


def answer(*events: bytes) -> Answer:
    """Reads event number n at time n."""
    result, parser = Answer(), SSEParser()
    for at, data in enumerate(events):
        for found in parser.feed(data):
            result.add(found, float(at))
    return result


def usage(completion: int, prompt: int = 7, cached: int | None = None) -> bytes:
    details = {"prompt_tokens_details": {"cached_tokens": cached}} if cached is not None else {}
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **details}})


def test_a_role_only_chunk_carries_no_token() -> None:
    got = answer(ROLE, delta("", usage=0), delta("a"), delta("b", finish="stop"), DONE)
    assert (got.chunk_at, got.chunk_tokens) == ([2.0, 3.0], [1, 1])
    assert "".join(got.texts) == "ab"
    assert (got.finish_reason, got.done) == ("stop", True)


def test_chunks_of_several_tokens_are_counted_by_the_server() -> None:
    got = answer(
        ROLE, delta("abc", usage=3), delta("d", usage=4), delta("ef", usage=6, finish="length"), usage(6), DONE
    )
    assert (got.chunk_tokens, got.output_tokens, got.counted_each) == ([3, 1, 2], 6, True)


def test_a_total_at_the_end_is_the_total_and_not_a_chunk() -> None:
    got = answer(delta("ab"), delta("cd"), delta("", finish="length"), usage(5, prompt=11, cached=8), DONE)
    assert (got.chunk_tokens, got.output_tokens, got.counted_each) == ([1, 1], 5, False)
    assert (got.prompt_tokens, got.cached_tokens) == (11, 8)


def test_a_total_in_the_finish_chunk_is_not_a_chunk_either() -> None:
    got = answer(delta("ab"), delta("cd"), delta("", usage=5, finish="length"), DONE)
    assert (got.chunk_at, got.chunk_tokens, got.output_tokens) == ([0.0, 1.0], [1, 1], 5)


def test_without_any_count_a_chunk_is_a_token() -> None:
    got = answer(delta("ab"), delta("cd", finish="stop"), DONE)
    assert (got.chunk_tokens, got.output_tokens, got.completion_tokens) == ([1, 1], 2, -1)


def test_tokens_without_text_are_counted_when_the_server_counts() -> None:
    got = answer(delta("a", usage=1), delta("", usage=2), delta("", usage=3, finish="length"), DONE)
    assert (got.chunk_at, got.chunk_tokens) == ([0.0, 1.0, 2.0], [1, 1, 1])


def test_the_first_token_is_the_first_one_seen() -> None:
    """Half a character is held back by the server: its token arrives with the chunk that shows it."""
    got = answer(delta("", usage=1), delta("ß", usage=2), delta("x", usage=3, finish="length"))
    assert (got.chunk_at, got.chunk_tokens) == ([1.0, 2.0], [2, 1])


def test_tokens_that_never_show_still_have_times() -> None:
    got = answer(delta("", usage=1), delta("", usage=2, finish="length"))
    assert (got.chunk_at, got.chunk_tokens, got.output_tokens) == ([0.0, 1.0], [1, 1], 2)


def test_text_after_the_last_token_adds_no_token() -> None:
    got = answer(delta("a", usage=1), delta("b", usage=1, finish="length"))
    assert (got.chunk_tokens, "".join(got.texts)) == ([1], "ab")


def test_events_of_one_read_are_one_chunk() -> None:
    got = answer(delta("a", usage=1) + delta("b", usage=2), delta("c", usage=3))
    assert (got.chunk_at, got.chunk_tokens) == ([0.0, 1.0], [2, 1])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_output(name: str) -> None:
    got = answer(ROLE, delta(None, **{name: "hm "}), delta("yes"))
    assert (got.chunk_at, "".join(got.texts)) == ([1.0, 2.0], "hm yes")


def test_tool_calls_are_output() -> None:
    got = answer(ROLE, delta(None, tool_calls=[{"index": 0}]))
    assert (got.chunk_at, got.chunk_tokens) == ([1.0], [1])


def test_completions_carry_text() -> None:
    got = answer(event({"choices": [{"text": "a"}]}), event({"choices": [{"text": "b", "finish_reason": "length"}]}))
    assert ("".join(got.texts), got.chunk_tokens, got.finished) == ("ab", [1, 1], True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"data: {nonsense\n\n", "malformed event .*nonsense"),
        (b"data: \xff\xfe\n\n", "malformed event"),
        (b'data: {"choices": 3}\n\n', "malformed event"),
        (event({"error": {"message": "rank 3 died"}}), "rank 3 died"),
        (b'event: error\ndata: {"message": "overloaded"}\n\n', "overloaded"),
    ],
)
def test_what_is_not_an_answer_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(AnswerError, match=reason):
        answer(delta("a"), data)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "type": "x"}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>Bad Gateway</html>", "<html>Bad Gateway</html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 900, "x" * 500),
    ],
)
def test_the_servers_message_is_found(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_bodies() -> None:
    chat = Sample("a", messages=({"role": "system", "content": "s"}, {"role": "user", "content": "u"}))
    plain = Sample("b", prompt="Once")
    body = json.loads(encode_body(chat, LoadConfig(osl=5), "m", 3))
    assert body["messages"] == list(chat.messages)
    assert (body["model"], body["max_tokens"], body["seed"], body["ignore_eos"]) == ("m", 5, 3, True)
    assert (body["stream"], body["stream_options"]["continuous_usage_stats"]) == (True, True)
    assert json.loads(encode_body(plain, LoadConfig(), "m", 0))["messages"] == [{"role": "user", "content": "Once"}]
    completions = LoadConfig(endpoint="completions", ignore_eos=False)
    body = json.loads(encode_body(chat, completions, "m", 0))
    assert body["prompt"] == "s\n\nu"
    assert not {"messages", "ignore_eos"} & set(body)
    assert json.loads(encode_body(plain, completions, "m", 0))["prompt"] == "Once"
