"""Prompts and random words: order, repetition, lengths, and what is wrong with a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from toolkit.config import LoadConfig
from toolkit.loadgen.datasets import DATASETS
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
