"""Several choices, logprobs and echo: what the ranks are sent, and what the client gets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.frontend_peer import each_way, serving, until, utf8
from tests.unit.test_frontend_generate import CHAT, TEXT, chat, text
from toolkit.engine.core import SamplingParams, TokenLogprobs
from toolkit.engine.frontend.tokenizer import HfTokenizer
from toolkit.engine.messages import Abort, Failed, Generate

__all__ = ["each_way"]
pytestmark = pytest.mark.usefixtures("each_way")


def figures(logprob: float, *top: tuple[str, float]) -> TokenLogprobs:
    return TokenLogprobs(logprob, [ord(char) for char, _ in top], [value for _, value in top])


def test_every_option_reaches_the_rank() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            bench.ranks.reply = [utf8("a")]
            options: dict[str, Any] = {
                "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.0,
                "frequency_penalty": -1.0, "repetition_penalty": 1.2, "seed": 5, "min_tokens": 2,
            }  # fmt: skip
            more = {"logit_bias": {"7": -100}, "stop_token_ids": [9], "logprobs": True, "top_logprobs": 3}
            assert (await bench.post(CHAT, chat(**options, **more)))[0] == 200
            assert (await bench.post(TEXT, text(echo=True, logprobs=0, top_k=-1)))[0] == 200
            first, second = bench.ranks.of(0, Generate)
            assert first.sampling == SamplingParams(
                max_tokens=20, logit_bias={7: -100.0}, stop_token_ids=(9,), logprobs=3, **options
            )
            assert (second.sampling.logprobs, second.sampling.prompt_logprobs, second.sampling.top_k) == (0, 0, 0)

    asyncio.run(run())


def test_further_choices_follow_the_first_to_its_rank_once_its_prompt_is_computed() -> None:
    async def run() -> None:
        async with serving() as bench:
            answer = asyncio.create_task(bench.post(TEXT, text(n=3, seed=2**63 - 2, temperature=1.0)))
            first = await bench.ranks.generate(0)
            await asyncio.sleep(0.05)
            assert len(bench.ranks.of(0, Generate)) == 1
            await bench.ranks.output(first.rid, utf8("a"), cached_tokens=1)
            second, third = await bench.ranks.generate(0, 1), await bench.ranks.generate(0, 2)
            assert [g.sampling.seed for g in (first, second, third)] == [2**63 - 2, 2**63 - 1, 0]
            assert first.prompt == second.prompt == third.prompt and not bench.ranks.of(1, Generate)
            await bench.ranks.output(third.rid, utf8("ccc"), "length", cached_tokens=2)
            await bench.ranks.output(first.rid, utf8("a"), "length")
            await bench.ranks.output(second.rid, utf8("b"), "length", cached_tokens=2)
            status, body, _ = await answer
            assert status == 200
            assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "aa"), (1, "b"), (2, "ccc")]
            assert body["usage"]["completion_tokens"] == 6 and body["usage"]["prompt_tokens"] == 2
            assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
            await bench.ranks.check_wakes()

    asyncio.run(run())


def test_a_stream_of_choices_names_each_role_once_and_ends_after_the_last() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            call = bench.stream(CHAT, chat(n=2, stop="!", stream_options={"include_usage": True}))
            answer = asyncio.create_task(call)
            first = await bench.ranks.generate()
            await bench.ranks.output(first.rid, utf8("a"))
            second = await bench.ranks.generate(index=1)
            await bench.ranks.output(first.rid, utf8("b!"))  # stops choice 0 alone
            await bench.ranks.output(first.rid, utf8("late"))
            await bench.ranks.output(second.rid, utf8("c"))
            await bench.ranks.output(second.rid, utf8("d"), "length")
            events, _ = await answer
            assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] == 5
            choices = [event["choices"][0] for event in events[:-2]]
            for index, text, reason in ((0, "ab", "stop"), (1, "cd", "length")):  # outputs that wait go out as one
                mine = [c for c in choices if c["index"] == index]
                assert "".join(c["delta"].get("content", "") for c in mine) == text
                assert [c["delta"].get("role") for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
                assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [reason]
            assert (await bench.ranks.aborted()).rid == first.rid and len(bench.ranks.of(0, Abort)) == 1

    asyncio.run(run())


@pytest.mark.parametrize("how", ["leaves", "fails"])
def test_all_choices_end_with_their_request(how: str) -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            answer = asyncio.create_task(bench.post(TEXT, text(n=3)))
            first = await bench.ranks.generate()
            await bench.ranks.output(first.rid, utf8("a"))
            rids = {(await bench.ranks.generate(index=i)).rid for i in range(3)}
            if how == "leaves":
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)
            else:
                await bench.ranks.output((await bench.ranks.generate(index=1)).rid, [], "error", error="no blocks")
                rids -= {(await bench.ranks.generate(index=1)).rid}
                status, body, _ = await answer
                assert status == 500 and body["error"]["message"] == "no blocks"
            await until(lambda: {abort.rid for abort in bench.ranks.of(0, Abort)} == rids)
            assert bench.server._fleet.num_open == 0

    asyncio.run(run())


def test_choices_count_as_requests_that_are_held() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1, max_queued_requests=3) as bench:
            status, body, _ = await bench.post(TEXT, text(n=4))
            assert status == 400 and "n=4 is more than engine.max_queued_requests=3" in body["error"]["message"]
            held = asyncio.create_task(bench.post(TEXT, text()))
            await bench.ranks.generate()
            assert (await bench.post(TEXT, text(n=3)))[0] == 503
            await bench.ranks.send(Failed(0, "lost"))
            assert (await held)[0] == 500

    asyncio.run(run())


def test_chat_logprobs_have_an_entry_for_every_token_counted() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            for stream in (False, True):
                body = chat(logprobs=True, top_logprobs=2, stop_token_ids=[0])
                answer = asyncio.create_task(bench.stream(CHAT, body) if stream else bench.post(CHAT, body))
                rid = (await bench.ranks.generate(index=int(stream))).rid
                accent = utf8("é")
                await bench.ranks.output(rid, accent[:1], logprobs=[figures(-0.5, ("a", -0.25), ("b", -1.0))])
                tokens = [accent[1], 0]  # the second half, and the end token
                scores = [figures(-1.0), figures(float("-inf"), ("z", float("-inf")))]
                await bench.ranks.output(rid, tokens, "stop", logprobs=scores)
                got: Any = await answer
                if stream:
                    choices = [event["choices"][0] for event in got[0][:-1]]
                    content = [entry for choice in choices for entry in choice["logprobs"]["content"]]
                    assert [len(choice["logprobs"]["content"]) for choice in choices] == [1, 2]
                else:
                    assert got[1]["usage"]["completion_tokens"] == 3
                    assert got[1]["choices"][0]["message"]["content"] == "é"
                    content = got[1]["choices"][0]["logprobs"]["content"]
                assert [entry["bytes"] for entry in content] == [accent[:1], accent[1:], [0]]
                assert [entry["logprob"] for entry in content] == [-0.5, -1.0, -9999.0]
                assert [top["token"] for top in content[0]["top_logprobs"]] == ["a", "b"]

    asyncio.run(run())


def test_echo_with_logprobs_covers_prompt_and_output_of_every_choice() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            answer = asyncio.create_task(bench.post(TEXT, text(prompt="né", echo=True, logprobs=1, n=2)))
            first = await bench.ranks.generate()
            scores = [figures(-0.5, ("x", -0.25)), figures(-1.5, ("y", -0.5))]
            await bench.ranks.output(
                first.rid, utf8("a"), "length", logprobs=[figures(-2.0, ("a", -2.0))], prompt_logprobs=scores
            )
            second = await bench.ranks.generate(index=1)
            assert second.sampling.prompt_logprobs is None
            await bench.ranks.output(second.rid, utf8("bc"), "length", logprobs=[figures(-3.0), figures(-4.0)])
            _, body, _ = await answer
            assert [choice["text"] for choice in body["choices"]] == ["néa", "nébc"]
            one, two = (choice["logprobs"] for choice in body["choices"])
            assert one["token_logprobs"] == [None, -0.5, -1.5, -2.0]
            assert one["tokens"] == ["n", "\ufffd", "\ufffd", "a"]
            assert one["text_offset"] == [0, 1, 1, 2]
            assert one["top_logprobs"] == [None, {"x": -0.25, "\ufffd": -0.5}, {"y": -0.5, "\ufffd": -1.5}, {"a": -2.0}]
            assert two["token_logprobs"] == [None, -0.5, -1.5, -3.0, -4.0] and two["text_offset"][3:] == [2, 3]

    asyncio.run(run())


def test_echo_without_output_scores_a_prompt_given_as_tokens() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            answer = asyncio.create_task(bench.post(TEXT, text(prompt=[104], echo=True, logprobs=0, max_tokens=0)))
            request = await bench.ranks.generate()
            assert request.sampling.max_tokens == 1
            await bench.ranks.output(request.rid, utf8("?"), "length", logprobs=[figures(-1.0)])
            _, body, _ = await answer
            choice = body["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("h", "length")
            assert choice["logprobs"] == {
                "tokens": ["h"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]
            }  # fmt: skip
            assert body["usage"]["completion_tokens"] == 0

    asyncio.run(run())


def test_bytes_of_tokens_join_to_the_text(tmp_path: Path) -> None:
    """Byte-level vocabularies write bytes as other characters, SentencePiece spaces and bytes in a way of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def load(tokenizer: Tokenizer) -> HfTokenizer:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return HfTokenizer(str(tmp_path), str(tmp_path))

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens(["<|end|>"])
    loaded = load(byte_level)
    written = "naïve 日本 🎉\n\x00\x7f\xa0"
    assert b"".join(loaded.token_bytes(token) for token in loaded.encode(written)).decode() == written
    assert loaded.token_bytes(256) == b"<|end|>" and loaded.token_bytes(99_999) == b""

    vocab = {"<unk>": 0, "\u2581the": 1, "\u2581fox": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    pieces = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    loaded = load(pieces)
    assert [loaded.token_bytes(token) for token in (1, 2, 0xE9 + 3)] == [b" the", b" fox", b"\xe9"]
