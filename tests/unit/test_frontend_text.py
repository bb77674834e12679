"""Tokens to text and back: stop strings, incremental decoding, tokenizers and chat templates."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.frontend_peer import TINY_MIXTRAL, serving
from toolkit.config.model import ModelConfig
from toolkit.engine.frontend.detokenize import Detokenizer, StopMatcher, TextStream
from toolkit.engine.frontend.tokenizer import ByteTokenizer, HfTokenizer, load_tokenizer
from toolkit.engine.messages import Generate

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developer here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in Hugging Face's files, small enough that most characters are several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    return path


@pytest.fixture(scope="module")
def hf(folder: Path) -> HfTokenizer:
    loaded = load_tokenizer(ModelConfig(tokenizer=str(folder)))
    assert isinstance(loaded, HfTokenizer)
    return loaded


def decode(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.flush()]


def cut(text: str, stops: tuple[str, ...]) -> str:
    """What a stop string leaves of ``text``: the definition, character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher, shown = StopMatcher(tuple(stops)), ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert cut("".join(pieces), tuple(stops)).startswith(shown)  # never more than may be shown
        if matcher.stopped:
            break
    shown += matcher.flush()
    whole = "".join(pieces)
    assert shown == cut(whole, tuple(stops))
    assert matcher.stopped == any(stop in whole for stop in stops)


def test_only_what_may_begin_a_stop_string_is_withheld() -> None:
    matcher = StopMatcher(("</think>",))
    assert [matcher.push(text) for text in ("a<b", "<", "/thi", "s", "<")] == ["a<b", "", "", "</this", ""]
    assert matcher.flush() == "<"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_come_out_as_whole_characters(text: str) -> None:
    tokenizer = ByteTokenizer()
    pieces = decode(tokenizer.stream(), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert "".join(decode(ByteTokenizer().stream(), [0x61, 0xFF, 0x62, 299, 0xE6])) == "a\ufffdb\ufffd\ufffd"


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    detokenizer = Detokenizer(ByteTokenizer().stream(), ("b",))
    assert [detokenizer.push(token) for token in b"aab"] == ["a", "a", ""]
    assert (detokenizer.stopped, detokenizer.num_tokens) == (True, 3)


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    detokenizer = Detokenizer(ByteTokenizer().stream(), ("ab",), min_tokens=3)
    assert [detokenizer.push(token) for token in b"abab"] == ["a", "b", "a", "b"]
    assert [detokenizer.push(token) for token in b"xab"] == ["x", "", ""]
    assert detokenizer.stopped


@pytest.mark.parametrize("text", ["the quick brown fox", "naïve 日本語 🎉🎉 ok", " leading and trailing ", "🎉"])
def test_hf_stream_joins_to_the_text_without_half_characters(hf: HfTokenizer, text: str) -> None:
    pieces = decode(hf.stream(), hf.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_hf_stream_gives_up_withheld_bytes(hf: HfTokenizer) -> None:
    party, word = hf.encode("🎉"), hf.encode("the")
    assert len(party) > 1
    assert "".join(decode(hf.stream(), word + party[:1])) == "the\ufffd"
    assert "".join(decode(hf.stream(), party[:1] + word)) == "\ufffdthe"
    bad = decode(hf.stream(), party[1:2] * 100 + word)  # never a character: must not be withheld for ever
    assert "".join(bad) == "\ufffd" * 100 + "the"
    assert sum(bool(piece) for piece in bad) > 5


def test_hf_stream_leaves_special_tokens_out(hf: HfTokenizer) -> None:
    end = hf.encode("<|im_end|>")
    assert len(end) == 1
    tokens = hf.encode("the") + end * 40 + hf.encode(" fox")
    assert "".join(decode(hf.stream(), tokens)) == "the fox"


def test_hf_stop_tokens_come_from_tokenizer_generation_config_and_template(hf: HfTokenizer) -> None:
    assert set(hf.stop_token_ids) == {*hf.encode("<|endoftext|>"), 0, 7, *hf.encode("<|im_end|>")}


def test_hf_chat_template(hf: HfTokenizer) -> None:
    tokens = hf.encode_chat([{"role": "user", "content": "the dog"}])
    assert tokens == hf.encode("<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="refuses these messages: no developer here"):
        hf.encode_chat([{"role": "developer", "content": ""}])


def test_a_frontend_tokenizes_without_torch(folder: Path) -> None:
    """transformers imports it where it can: seconds at the start of a server, and half of its memory."""
    code = (
        "import sys; from toolkit.config.model import ModelConfig\n"
        "from toolkit.engine.frontend.__main__ import forgo_torch; forgo_torch()\n"
        "from toolkit.engine.frontend.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer(ModelConfig(tokenizer=sys.argv[1]))\n"
        "print(*tokenizer.encode_chat([{'role': 'user', 'content': 'the fox'}]))\n"
        "assert sys.modules['torch'] is None and not [name for name in sys.modules if name.startswith('torch.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "PyTorch" not in done.stdout + done.stderr, done.stderr
    known = load_tokenizer(ModelConfig(tokenizer=str(folder))).encode_chat([{"role": "user", "content": "the fox"}])
    assert done.stdout.split() == [str(token) for token in known]


def test_a_tokenizer_without_chat_template_says_what_to_use(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="use /v1/completions"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.stop_token_ids == tuple(tokenizer.encode("<|endoftext|>"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))


def test_the_end_token_is_sent_to_the_rank_counted_and_not_shown(folder: Path, hf: HfTokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "the dog"}], "max_tokens": 30}

    async def run() -> None:
        model = ModelConfig(name="tiny", hf_config=TINY_MIXTRAL, tokenizer=str(folder))
        async with serving(tp_size=1, dp_size=1, model=model) as bench:
            answer = asyncio.create_task(bench.post("/v1/chat/completions", body))
            request = await bench.ranks.generate()
            assert request.sampling.stop_token_ids == hf.stop_token_ids
            assert request.prompt == hf.encode_chat(body["messages"])
            tokens = hf.encode("the fox 🎉") + hf.encode("<|im_end|>")
            await bench.ranks.output(request.rid, tokens, "stop")
            _, got, _ = await answer
            assert got["choices"][0]["message"]["content"] == "the fox 🎉"
            assert got["choices"][0]["finish_reason"] == "stop"
            assert got["usage"]["completion_tokens"] == len(tokens)

            answer = asyncio.create_task(bench.post("/v1/chat/completions", {**body, "ignore_eos": True}))
            request = await bench.ranks.generate(index=1)
            assert request.sampling.stop_token_ids == ()
            await bench.ranks.output(request.rid, tokens + hf.encode("the"), "length")
            _, got, _ = await answer
            assert got["choices"][0]["message"]["content"] == "the fox 🎉the"
            assert len(bench.ranks.of(0, Generate)) == 2

    asyncio.run(run())
