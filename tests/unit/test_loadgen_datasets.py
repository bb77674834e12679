"""Prompts and random words: order, repetition, lengths, and what is wrong with a file."""

from __future__ import annotations

import json
import statistics
from itertools import islice
from pathlib import Path

import pytest

from toolkit.config.load import LoadConfig
from toolkit.config.mapping import from_mapping
from toolkit.loadgen.datasets import DATASETS, Sample
from toolkit.loadgen.datasets.prompts import BUNDLED, Prompts, read_prompts
from toolkit.loadgen.datasets.random import RandomText
from toolkit.loadgen.datasets.text import WORDS


def ids(dataset: Prompts, count: int) -> list[str]:
    return [sample.id for sample in islice(dataset, count)]


def test_the_bundled_prompts() -> None:
    samples = read_prompts(BUNDLED)
    assert len(samples) >= 40
    systems = [sample.messages[0]["content"] for sample in samples if sample.as_messages()[0]["role"] == "system"]
    shared = max(set(systems), key=systems.count)
    assert systems.count(shared) >= 3, "some share a system prompt"
    assert len(shared.split()) > 80, "a long one, so that prefix reuse shows"
    lengths = [len(sample.as_prompt().split()) for sample in samples]
    assert min(lengths) < 12
    assert max(lengths) > 120


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    count = len(read_prompts(BUNDLED))
    order = ids(Prompts(BUNDLED, seed=1), 3 * count)
    rounds = [order[i : i + count] for i in range(0, 3 * count, count)]
    assert all(len(set(part)) == count for part in rounds)
    assert rounds[0] != rounds[1]


def test_the_order_depends_on_the_seed_only() -> None:
    assert ids(Prompts(BUNDLED, seed=1), 60) == ids(Prompts(BUNDLED, seed=1), 60)
    assert ids(Prompts(BUNDLED, seed=1), 60) != ids(Prompts(BUNDLED, seed=2), 60)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no prompt"),
        ('{"id": "a", "prompt": "x"}\n{"id": "b"', "line 2: "),
        ('{"id": "a"}', "line 1: needs either messages or prompt"),
        ('{"id": "a", "prompt": ""}', "needs either messages or prompt"),
        ('{"id": "a", "prompt": "x", "messages": [{"role": "user", "content": "y"}]}', "needs either"),
        ('{"id": "a", "messages": [{"role": "user"}]}', "content"),
        ('{"id": "a", "promt": "x"}', "promt"),
        ('{"id": 3, "prompt": "x"}', "Expected `str`"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}', "'a' is given twice"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        DATASETS["prompts"](LoadConfig(dataset_path=str(file)), "")
    assert "mine.jsonl" in str(caught.value)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        Prompts(tmp_path / "none.jsonl", seed=0)


@pytest.mark.parametrize("isl", [1, 7, 300])
def test_random_text_has_the_length_asked_for(isl: int) -> None:
    for sample in islice(RandomText(LoadConfig(isl=isl), ""), 5):
        assert len(sample.prompt.split()) == isl
    for sample in islice(RandomText(LoadConfig(isl=isl), "bytes"), 5):
        assert len(sample.prompt.encode()) == isl


def test_random_text_in_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    dataset = DATASETS["random"](LoadConfig(isl=50), str(tmp_path))
    for sample in islice(dataset, 5):
        assert len(tokenizer.encode(sample.prompt).ids) == 50


def test_random_samples_differ_and_repeat_with_the_seed() -> None:
    first = list(islice(RandomText(LoadConfig(isl=20, seed=5), ""), 30))
    assert first == list(islice(RandomText(LoadConfig(isl=20, seed=5), ""), 30))
    assert len({sample.prompt for sample in first}) == 30
    assert first != list(islice(RandomText(LoadConfig(isl=20, seed=6), ""), 30))


def test_a_missing_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist"):
        RandomText(LoadConfig(isl=8), str(tmp_path))


def test_lengths_vary_as_asked() -> None:
    def lengths(**load: object) -> list[int]:
        dataset = RandomText(from_mapping({"isl": 200, "osl": 50, **load}, LoadConfig), "")
        return [len(sample.prompt.split()) for sample in islice(dataset, 400)]

    assert set(lengths()) == {200}
    normal = lengths(isl_stddev=30.0)
    assert statistics.mean(normal) == pytest.approx(200, abs=6)
    assert statistics.stdev(normal) == pytest.approx(30, abs=5)
    even = lengths(range_ratio=0.5)
    assert min(even) >= 100
    assert max(even) <= 300
    assert statistics.stdev(even) == pytest.approx(200 / 12**0.5, abs=6)
    osl = [s.output_tokens or 50 for s in islice(RandomText(LoadConfig(osl=50, osl_stddev=9.0), ""), 300)]
    assert statistics.stdev(osl) == pytest.approx(9, abs=2)


def test_prefixes_are_shared_by_the_pool_only() -> None:
    dataset = RandomText(LoadConfig(isl=60, prefix_len=40, num_prefixes=3), "")
    texts = [sample.prompt.split() for sample in islice(dataset, 60)]
    assert {len(text) for text in texts} == {60}
    assert len({" ".join(text[:40]) for text in texts}) == 3
    assert len({" ".join(text[40:]) for text in texts}) == 60


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "deepseek_v4"])
def test_lengths_are_exact_with_real_tokenizers(shared_data: Path, name: str) -> None:
    from tokenizers import Tokenizer

    file = shared_data / "tokenizers" / f"{name}.tokenizer.json"
    tokens = Tokenizer.from_file(str(file))
    for load in (LoadConfig(isl=1), LoadConfig(isl=777), LoadConfig(isl=500, prefix_len=128, num_prefixes=2)):
        for sample in islice(RandomText(load, str(file)), 4):
            assert len(tokens.encode(sample.prompt, add_special_tokens=False).ids) == load.isl


def test_conversations_of_random_text() -> None:
    samples = list(islice(RandomText(LoadConfig(turns=3, think_s=0.5, isl=9), ""), 6))
    assert [s.session for s in samples] == ["s0"] * 3 + ["s1"] * 3
    assert [s.more_turns for s in samples] == [True, True, False] * 2
    assert {s.think_s for s in samples} == {0.5}
    assert len({s.id for s in samples}) == 6


def test_an_image_goes_with_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"picture")
    sample = next(iter(RandomText(LoadConfig(image=str(tmp_path / "one.png"), isl=5), "")))
    image, text = sample.messages[0]["content"]
    assert image["image_url"]["url"] == "data:image/png;base64,cGljdHVyZQ=="
    assert len(text["text"].split()) == 5
    with pytest.raises(ValueError, match="not an image by its name"):
        RandomText(LoadConfig(image=str(tmp_path / "one.txt")), "")


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "one"},
     {"from": "gpt", "value": "uno dos"}, {"from": "human", "value": "two"}, {"from": "gpt", "value": "tres"}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "hello"}]},
    {"conversations": [{"from": "human", "value": "three"}, {"from": "gpt", "value": "x"}]},
]  # fmt: skip


def test_sharegpt(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(SHAREGPT))
    single = list(islice(DATASETS["sharegpt"](LoadConfig(dataset_path=str(file)), ""), 4))
    assert sorted(s.id for s in single[:2]) == ["2", "a"], "the one without a question is left out"
    assert {s.output_tokens for s in single} == {0}
    assert not any(s.session for s in single)
    several = list(islice(DATASETS["sharegpt"](LoadConfig(dataset_path=str(file), turns=5), "bytes"), 6))
    chat = [s for s in several if s.id.startswith("a")]
    assert [m["content"] for m in chat[0].messages] == ["be kind", "one"]
    assert [m["content"] for m in chat[1].messages] == ["two"]
    assert (chat[0].output_tokens, chat[0].more_turns, chat[1].more_turns) == (7, True, False)
    assert chat[0].session == chat[1].session != chat[2].session, "another time is another session"


@pytest.mark.parametrize(
    ("dataset", "text", "reason"),
    [
        ("sharegpt", "[{", "not in ShareGPT's form"),
        ("sharegpt", "[]", "holds no conversation"),
        ("mooncake", '{"timestamp": 0}', "line 1: .*input_length"),
        ("mooncake", "", "holds no request"),
        ("azure", "TIMESTAMP,Context\n", "has no column ContextTokens, GeneratedTokens"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,x,1\n", "line 2: "),
        ("burstgpt", "Timestamp,Request tokens\n", "has no column Response tokens"),
        ("trace", '{"at_s": 0, "osl": 1, "islx": 3}', "line 1: .*islx"),
    ],
)
def test_bad_files_of_other_datasets_are_explained(tmp_path: Path, dataset: str, text: str, reason: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        DATASETS[dataset](LoadConfig(dataset=dataset, dataset_path=str(file)), "")


def trace(dataset: str, file: Path, text: str = "", arrival: str = "trace") -> list[Sample]:
    if text:
        file.write_text(text)
    load = from_mapping({"dataset": dataset, "dataset_path": str(file), "arrival": arrival}, LoadConfig)
    return list(islice(DATASETS[dataset](load, ""), 10_000))


def test_traces_say_when_and_how_long(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    azure = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.1000000,5,2\n2023-11-16 18:17:03.6000000,9,3\n"
    )
    samples = trace("azure", file, azure)
    assert [(s.at_s, len(s.prompt.split()), s.output_tokens) for s in samples] == [
        (0, 9, 3),
        (pytest.approx(0.5, abs=1e-5), 5, 2),
    ]
    burst = "Timestamp,Model,Request tokens,Response tokens\n5,x,7,1\n6.5,x,8,0\n8,x,6,4\n"
    assert [(s.at_s, s.output_tokens) for s in trace("burstgpt", file, burst)] == [(0, 1), (3, 4)]
    own = '{"at_s": 1, "osl": 4, "prompt": "hi"}\n{"at_s": 2, "osl": 5, "isl": 3}\n'
    assert next((s.at_s, s.as_prompt()[:2]) for s in trace("trace", file, own)) == (0, "hi")
    assert len(trace("trace", file, own, arrival="poisson")) == 10_000, "elsewhere it repeats"


def test_equal_hashes_are_equal_prefixes(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [1, 2, 3]},
        {"timestamp": 500, "input_length": 1300, "output_length": 1, "hash_ids": [1, 2, 9]},
        {"timestamp": 900, "input_length": 600, "output_length": 1, "hash_ids": [8, 2]},
    ]
    one, two, three = (
        s.prompt.split() for s in trace("mooncake", tmp_path / "m", "\n".join(json.dumps(line) for line in lines))
    )
    assert [len(text) for text in (one, two, three)] == [1100, 1300, 600]
    assert one[:1024] == two[:1024]
    assert one[1024:] != two[1024:1100]
    assert three[:100] != one[:100]


def test_the_published_traces(shared_data: Path) -> None:
    mooncake = DATASETS["mooncake"](
        from_mapping(
            {"dataset": "mooncake", "arrival": "trace",
             "dataset_path": str(shared_data / "traces" / "mooncake_synthetic_trace.jsonl")}, LoadConfig
        ), "",
    )  # fmt: skip
    first = next(iter(mooncake))
    assert (first.at_s, first.output_tokens, len(first.prompt.split())) == (0, 6, 40160)
    azure = DATASETS["azure"](
        LoadConfig(dataset="azure", dataset_path=str(shared_data / "traces" / "azure_llm_2023_code.csv")), ""
    )
    assert next(iter(azure)).output_tokens == 10
