"""dataset=sharegpt: conversations that people had, from a JSON file in ShareGPT's form.

``[{"id": ..., "conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}, ...]``. With ``turns=1`` the
first question is asked; with more, the questions of a conversation one after the other, each after the server's own
answer. The recorded answer gives the length to ask for where a tokenizer is given, else ``osl`` does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from toolkit.config.load import LoadConfig
from toolkit.loadgen.datasets import Sample
from toolkit.loadgen.datasets.text import TextMaker

ASKS = ("human", "user")
ANSWERS = ("gpt", "chatgpt", "assistant", "bard", "bing")


class _Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str = ""


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []
    id: str | int | None = None


class ShareGPT:
    """Every conversation of the file once, in seeded order, then all of them again in another order, and so on.

    Raises:
        ValueError: the file cannot be read, or holds no conversation that begins with a question.
    """

    def __init__(self, load: LoadConfig, tokenizer: str) -> None:
        self._load = load
        self._text = TextMaker(tokenizer) if tokenizer else None
        path = Path(load.dataset_path).expanduser()
        try:
            read = msgspec.json.decode(path.read_bytes(), type=list[_Conversation])
        except OSError as error:
            raise ValueError(f"dataset_path={path}: {error.strerror}; give a ShareGPT JSON file") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"dataset_path={path} is not in ShareGPT's form: {error}") from None
        made = [self._samples(one, number) for number, one in enumerate(read)]
        self._conversations = [samples for samples in made if samples]
        if not self._conversations:
            raise ValueError(f"dataset_path={path} holds no conversation with a question and an answer")

    def __iter__(self) -> Iterator[Sample]:
        order, round_ = random.Random(self._load.seed), 0
        while True:
            for samples in order.sample(self._conversations, len(self._conversations)):
                for sample in samples:  # a conversation that comes again is another session
                    yield replace(sample, session=f"{sample.session}/{round_}") if sample.session else sample
            round_ += 1

    def _samples(self, one: _Conversation, number: int) -> list[Sample]:
        before: tuple[dict[str, str], ...] = ()
        samples: list[Sample] = []
        several = self._load.turns > 1
        for turn, answer in zip(one.conversations, one.conversations[1:], strict=False):
            if turn.speaker == "system" and not samples:
                before = ({"role": "system", "content": turn.value},)
            if turn.speaker not in ASKS or answer.speaker not in ANSWERS or not turn.value:
                continue
            index = len(samples)
            samples.append(
                Sample(
                    id=f"{one.id if one.id is not None else number}" + (f".{index}" if several else ""),
                    messages=(*before, {"role": "user", "content": turn.value}),
                    output_tokens=max(1, self._text.count(answer.value)) if self._text else 0,
                    session=f"s{number}" if several else "",
                    more_turns=True,
                    think_s=self._load.think_s,
                )
            )
            before = ()
            if len(samples) == self._load.turns:
                break
        return [*samples[:-1], replace(samples[-1], more_turns=False)] if samples else []
