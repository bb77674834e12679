"""Completions over HTTP: text, streams, stop strings, cancellation, and what reaches the ranks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.unit.frontend_peer import Bench, each_way, serving, utf8
from toolkit.engine.core import FinishReason
from toolkit.engine.messages import Abort, Failed, Generate, Output, Outputs, Wake

__all__ = ["each_way"]
pytestmark = pytest.mark.usefixtures("each_way")

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": 20, **more}


def test_whole_chat_answer_and_what_the_rank_was_sent() -> None:
    async def run() -> None:
        async with serving() as bench:
            bench.ranks.reply = [utf8("Hel"), utf8("lo")]
            status, body, headers = await bench.post(CHAT, chat(temperature=0.5, top_p=0.9, seed=7, ignore_eos=True))
            assert status == 200
            choice = body["choices"][0]
            assert choice["message"] == {"role": "assistant", "content": "Hello"}
            assert (choice["finish_reason"], choice["index"]) == ("length", 0)
            assert body["object"] == "chat.completion"
            prompt = utf8("user: hi\nassistant:")
            assert body["usage"] == {
                "prompt_tokens": len(prompt), "completion_tokens": 5, "total_tokens": len(prompt) + 5,
                "prompt_tokens_details": {"cached_tokens": 0},
            }  # fmt: skip
            assert headers["x-dp-rank"] == "0"
            assert body["id"].removeprefix("chatcmpl-") == headers["x-request-id"]
            sent = await bench.ranks.generate()
            assert sent.prompt == prompt
            s = sent.sampling
            assert (s.max_tokens, s.temperature, s.top_p, s.seed, s.stop_token_ids) == (20, 0.5, 0.9, 7, ())

    asyncio.run(run())


def test_requests_go_to_group_leaders_in_turn_and_wake_every_other_rank() -> None:
    async def run() -> None:
        async with serving(tp_size=4, dp_size=2) as bench:
            bench.ranks.reply = [utf8("a")]
            answers = [await bench.post(TEXT, text()) for _ in range(4)]
            assert [headers["x-dp-rank"] for _, _, headers in answers] == ["0", "1", "0", "1"]
            await bench.ranks.check_wakes()
            kinds = [[type(message) for message in seen] for seen in bench.ranks.seen]
            assert kinds[0] == [Generate, Wake, Generate, Wake]
            assert kinds[2] == [Wake, Generate, Wake, Generate]
            assert kinds[1] == kinds[3] == [Wake] * 4

    asyncio.run(run())


def test_stream_writes_one_event_a_step_and_joins_to_the_text() -> None:
    async def run() -> None:
        async with serving() as bench:
            bench.ranks.reply = [utf8("Hel"), utf8("lo"), utf8("!")]
            events, headers = await bench.stream(CHAT, chat())
            assert headers["Content-Type"] == "text/event-stream" and headers["x-dp-rank"] == "0"
            assert events.pop() == "[DONE]"
            deltas = [event["choices"][0]["delta"] for event in events]
            assert deltas == [{"content": "Hel", "role": "assistant"}, {"content": "lo"}, {"content": "!"}]
            assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
            assert all("usage" not in event for event in events)
            events, _ = await bench.stream(TEXT, text())
            assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "Hello!"
            assert {event["object"] for event in events[:-1]} == {"text_completion"}

    asyncio.run(run())


@pytest.mark.parametrize("end", ["length", "error"])
def test_what_waits_for_a_client_goes_out_in_one_write_an_event_each(end: FinishReason) -> None:
    async def run() -> None:
        async with serving() as bench:
            http = asyncio.create_task(_chunks(bench, text(stream=True)))
            request = await bench.ranks.generate()
            last = Output(request.rid, [] if end == "error" else utf8("c"), end, error="out of blocks")
            await bench.ranks.send(Outputs(0, [Output(request.rid, utf8("a")), Output(request.rid, utf8("b")), last]))
            chunks = await http
            texts = [json.loads(event[6:])["choices"][0]["text"] for event in chunks[0].split(b"\n\n")[:2]]
            assert texts == ["a", "b"]
            if end == "error":
                assert len(chunks) == 2 and b"out of blocks" in chunks[1]
            else:
                assert len(chunks) == 1 and chunks[0].endswith(b"data: [DONE]\n\n")

    asyncio.run(run())


async def _chunks(bench: Bench, body: dict[str, Any]) -> list[bytes]:
    """The HTTP chunks of an answer."""
    chunks, part = [], b""
    async with bench.http.post(TEXT, json=body) as response:
        async for data, ended in response.content.iter_chunks():
            part += data
            if ended:
                chunks.append(part)
                part = b""
    return [chunk for chunk in chunks if chunk]


def test_usage_in_streams() -> None:
    async def run() -> None:
        async with serving() as bench:
            bench.ranks.reply = [utf8("ab"), utf8("c")]
            events, _ = await bench.stream(TEXT, text(stream_options={"include_usage": True}))
            assert [event["usage"] for event in events[:2]] == [None, None]
            assert events[2]["choices"] == [] and events[2]["usage"]["completion_tokens"] == 3
            options = {"include_usage": True, "continuous_usage_stats": True}
            events, _ = await bench.stream(TEXT, text(stream_options=options))
            assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [2, 3, 3]
            assert [event["usage"]["prompt_tokens"] for event in events[:-1]] == [2, 2, 2]

    asyncio.run(run())


def test_cached_tokens_are_reported() -> None:
    async def run() -> None:
        async with serving() as bench:
            post = asyncio.create_task(bench.post(TEXT, text()))
            rid = (await bench.ranks.generate()).rid
            await bench.ranks.output(rid, utf8("a"), cached_tokens=1)
            await bench.ranks.output(rid, utf8("b"), "length")
            _, body, _ = await post
            assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}

    asyncio.run(run())


def test_characters_split_over_tokens_and_steps_stay_whole() -> None:
    async def run() -> None:
        async with serving() as bench:
            whole = "né 日本 🎉"
            bench.ranks.reply = [[byte] for byte in utf8(whole)]
            events, _ = await bench.stream(TEXT, text())
            pieces = [event["choices"][0]["text"] for event in events[:-1]]
            assert "".join(pieces) == whole
            assert len(pieces) == len(whole.encode())
            bench.ranks.reply = [utf8("ok🎉")[:-1]]  # ends inside a character
            _, body, _ = await bench.post(TEXT, text())
            assert body["choices"][0]["text"] == "ok\ufffd"

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_over_tokens_cuts_the_text_and_aborts_on_the_rank(stream: bool) -> None:
    async def run() -> None:
        async with serving() as bench:
            body = text(stop=["END", "never"])
            call = bench.stream(TEXT, body) if stream else bench.post(TEXT, body)
            answer = asyncio.create_task(call)
            rid = (await bench.ranks.generate()).rid
            for tokens in ("one E", "ND", " two"):  # "E" alone may not be shown; " two" comes too late
                await bench.ranks.output(rid, utf8(tokens))
            got = await answer
            assert (await bench.ranks.aborted()).rid == rid
            await bench.ranks.check_wakes()
            if stream:
                choices = [event["choices"][0] for event in got[0][:-1]]
                assert [c["text"] for c in choices] == ["one ", ""]
                assert choices[-1]["finish_reason"] == "stop"
            else:
                assert got[1]["choices"][0]["text"] == "one "
                assert got[1]["choices"][0]["finish_reason"] == "stop"
                assert got[1]["usage"]["completion_tokens"] == len("one END")

    asyncio.run(run())


def test_withheld_beginning_of_a_stop_string_comes_at_the_end() -> None:
    async def run() -> None:
        async with serving() as bench:
            bench.ranks.reply = [utf8("one E"), utf8("N")]
            events, _ = await bench.stream(TEXT, text(stop="END"))
            assert [event["choices"][0]["text"] for event in events[:-1]] == ["one ", "EN"]
            assert events[-2]["choices"][0]["finish_reason"] == "length"

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_request(stream: bool) -> None:
    async def run() -> None:
        async with serving(tp_size=4, dp_size=2) as bench:
            call = asyncio.create_task(_read_forever(bench, text(stream=stream)))
            rid = (await bench.ranks.generate()).rid
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert (await bench.ranks.aborted()).rid == rid
            await bench.ranks.check_wakes()
            bench.ranks.reply = [utf8("next")]
            _, body, _ = await bench.post(TEXT, text())
            assert body["choices"][0]["text"] == "next"
            assert sum(len(bench.ranks.of(rank, Abort)) for rank in range(4)) == 1

    asyncio.run(run())


async def _read_forever(bench: Bench, body: dict[str, Any]) -> None:
    async with bench.http.post(TEXT, json=body) as response:
        await response.read()


def test_an_error_of_the_rank_is_a_status_before_the_first_token_and_an_event_after_it() -> None:
    async def run() -> None:
        async with serving() as bench:
            for index, first in enumerate([[], utf8("a")]):
                http = asyncio.create_task(_raw(bench, text(stream=True)))
                request = await bench.ranks.generate(rank=index)
                if first:
                    await bench.ranks.output(request.rid, first)
                await bench.ranks.output(request.rid, [], "error", error="out of blocks")
                status, raw = await http
                assert status == (200 if first else 500)
                assert b"out of blocks" in raw and b"[DONE]" not in raw
            await bench.ranks.check_wakes()
            assert not bench.ranks.of(0, Abort)  # the rank has ended it itself

    asyncio.run(run())


async def _raw(bench: Bench, body: dict[str, Any]) -> tuple[int, bytes]:
    async with bench.http.post(TEXT, json=body) as response:
        return response.status, await response.read()


def test_a_rank_that_fails_ends_open_requests_and_makes_the_server_unhealthy() -> None:
    async def run() -> None:
        async with serving() as bench:
            open_request = asyncio.create_task(bench.post(TEXT, text()))
            await bench.ranks.generate()
            await bench.ranks.send(Failed(1, "CUDA out of memory"))
            status, body, _ = await open_request
            assert status == 500 and "rank 1: CUDA out of memory" in body["error"]["message"]
            status, body = await bench.get("/health")
            assert (status, body) == (503, {"state": "failed", "error": "rank 1: CUDA out of memory"})
            status, body, _ = await bench.post(TEXT, text())
            assert status == 503 and "CUDA out of memory" in body["error"]["message"]

    asyncio.run(run())


def test_no_more_than_max_queued_requests_are_held() -> None:
    async def run() -> None:
        async with serving(max_queued_requests=2) as bench:
            held = [asyncio.create_task(bench.post(TEXT, text())) for _ in range(2)]
            requests = [await bench.ranks.generate(0), await bench.ranks.generate(1)]
            status, body, headers = await bench.post(TEXT, text())
            assert status == 503 and headers["Retry-After"] == "1"
            assert "engine.max_queued_requests=2" in body["error"]["message"]
            for request in requests:
                await bench.ranks.output(request.rid, utf8("a"), "length")
            assert [status for status, _, _ in await asyncio.gather(*held)] == [200, 200]
            bench.ranks.reply = [utf8("b")]
            assert (await bench.post(TEXT, text()))[0] == 200

    asyncio.run(run())


def test_many_requests_at_once_get_each_their_own_text() -> None:
    async def run() -> None:
        async with serving() as bench:
            prompts = [f"request {i}" for i in range(40)]
            calls = [asyncio.create_task(bench.post(TEXT, text(prompt=p))) for p in prompts]
            sent = [await bench.ranks.generate(i % 2, i // 2) for i in range(40)]
            for step in range(3):  # one step of a rank holds tokens of all its requests
                finish = "length" if step == 2 else None
                for rank in (0, 1):
                    outs = [_part(request, step, finish) for request in sent[rank::2]]
                    await bench.ranks.send(Outputs(rank, outs))
            answers = [body["choices"][0]["text"] for _, body, _ in await asyncio.gather(*calls)]
            assert answers == [p[:9] for p in prompts]

    asyncio.run(run())


def _part(request: Generate, step: int, finish: Any) -> Any:
    from toolkit.engine.messages import Output

    return Output(request.rid, request.prompt[3 * step : 3 * step + 3], finish)


def test_seeds_differ_between_requests_and_repeat_between_starts(each_way: int) -> None:
    async def seeds(random_seed: int) -> list[int]:
        async with serving(tp_size=1, dp_size=1, random_seed=random_seed) as bench:
            bench.ranks.reply = [utf8("a")]
            for _ in range(3):
                await bench.post(TEXT, text(temperature=0.7))
            return [message.sampling.seed for message in bench.ranks.of(0, Generate)]

    first, again, other = (asyncio.run(seeds(seed)) for seed in (0, 0, 1))
    assert len(set(first)) == 3
    assert each_way > 1 or first == again, "which of several servers gets a connection is the kernel's choice"
    assert not set(first) & set(other)


def test_defaults_of_max_tokens_and_temperature() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            bench.ranks.reply = [utf8("a")]
            await bench.post(CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]})
            await bench.post(TEXT, {"prompt": [104, 105]})
            await bench.post(TEXT, {"prompt": ["hi"], "temperature": 0, "n": 1, "user": "me", "logprobs": None})
            chat_request, text_request, greedy = bench.ranks.of(0, Generate)
            assert chat_request.prompt == utf8("user: hi\nassistant:")
            assert chat_request.sampling.max_tokens == 128 - len(chat_request.prompt)
            assert (text_request.sampling.max_tokens, text_request.sampling.temperature) == (16, 1.0)
            assert text_request.prompt == greedy.prompt == [104, 105]
            assert (greedy.sampling.temperature, greedy.sampling.seed) == (0.0, 0)

    asyncio.run(run())


def test_stopping_the_server_ends_open_requests_and_frees_the_ranks() -> None:
    async def run() -> None:
        async with serving() as bench:
            started = asyncio.create_task(bench.http.post(TEXT, json=text(stream=True)))
            rid = (await bench.ranks.generate()).rid
            await bench.ranks.output(rid, utf8("a"))
            async with await started as response:
                assert b'"text":"a"' in await response.content.readuntil(b"\n\n")
                stopping = asyncio.create_task(bench.server.stop())
                assert b"shutting down" in await response.read()
            await stopping
            assert (await bench.ranks.aborted()).rid == rid
            with pytest.raises(aiohttp.ClientConnectionError):
                await bench.get("/live")

    asyncio.run(run())
