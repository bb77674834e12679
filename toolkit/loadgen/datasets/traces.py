"""Recorded traffic: when requests came, how long they were, and what they had in common.

``dataset=``
  mooncake   JSON Lines: timestamp (ms), input_length, output_length, hash_ids: equal ids are equal 512-token blocks
  azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens
  burstgpt   CSV: Timestamp (s), Request tokens, Response tokens
  trace      JSON Lines of one's own: at_s, isl, osl, and where wanted prefix_ids (blocks as above), prompt, messages

Texts are made of random words to the recorded length; equal blocks give equal texts, so that a prefix cache finds
what it would have found. Under ``arrival=trace`` each request is due when it was recorded, and the trace ends; under
any other arrival it supplies lengths, over and over.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.load import LoadConfig
from toolkit.loadgen.datasets import Sample
from toolkit.loadgen.datasets.text import TextMaker

BLOCK_TOKENS = 512  # of a hash id in Mooncake's traces
BLOCKS_KEPT = 4096


@dataclass(frozen=True)
class Recorded:
    """One request of a trace; ``blocks`` name its first 512-token blocks."""

    at_s: float
    isl: int
    osl: int
    blocks: tuple[int, ...] = ()
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


class _Own(msgspec.Struct, forbid_unknown_fields=True):
    at_s: float
    osl: int
    isl: int = 0
    prefix_ids: list[int] = []
    prompt: str = ""
    messages: list[dict[str, Any]] = []


class Trace:
    """The requests of ``dataset_path``, in the order in which they came.

    Raises:
        ValueError: the file cannot be read, is empty, or has a line that is not one of its kind; says which and why.
    """

    def __init__(self, load: LoadConfig, tokenizer: str) -> None:
        path = Path(load.dataset_path).expanduser()
        try:
            recorded = READERS[load.dataset](path)
        except OSError as error:
            raise ValueError(f"dataset_path={path}: {error.strerror}; give the trace's file") from None
        if not recorded:
            raise ValueError(f"dataset_path={path} holds no request")
        begin = min(one.at_s for one in recorded)
        self._begin = begin
        self.recorded = sorted(recorded, key=lambda one: one.at_s)
        self._repeat = load.arrival != "trace"
        self._seed = load.seed
        self._text = TextMaker(tokenizer)
        self._block = lru_cache(maxsize=BLOCKS_KEPT)(self._make_block)

    def __iter__(self) -> Iterator[Sample]:
        round_ = 0
        while self._repeat or not round_:
            for number, one in enumerate(self.recorded):
                yield self._sample(one, number, round_)
            round_ += 1

    def _sample(self, one: Recorded, number: int, round_: int) -> Sample:
        rng = random.Random(f"{self._seed}/{round_}/{number}")
        prompt = "" if one.messages else one.prompt or self._prompt(one, rng)
        return Sample(
            id=f"trace-{number}",
            messages=one.messages,
            prompt=prompt,
            output_tokens=max(1, one.osl),
            at_s=one.at_s - self._begin,
        )

    def _prompt(self, one: Recorded, rng: random.Random) -> str:
        """The request's blocks and, after them, words of its own. A block that is cut short is not shared whole."""
        length = max(1, one.isl)
        whole = one.blocks[: length // BLOCK_TOKENS]
        parts = [self._block(block) for block in whole]
        rest = length - len(whole) * BLOCK_TOKENS
        if rest and len(one.blocks) > len(whole):
            rng = random.Random(f"{self._seed}/block/{one.blocks[len(whole)]}/{rest}")
        if rest:
            parts.append(self._text.make(rng, rest))
        return " ".join(parts)

    def _make_block(self, block: int) -> str:
        return self._text.make(random.Random(f"{self._seed}/block/{block}"), BLOCK_TOKENS)


def _json_lines(path: Path, kind: type[Any]) -> Iterator[Any]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield msgspec.json.decode(line, type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                told = f"{error}; it should hold a JSON object a line: is dataset= the right one?"
                raise ValueError(f"{path}, line {number}: {told}") from None


def _mooncake(path: Path) -> list[Recorded]:
    lines = _json_lines(path, _Mooncake)
    return [Recorded(one.timestamp / 1e3, one.input_length, one.output_length, tuple(one.hash_ids)) for one in lines]


def _own(path: Path) -> list[Recorded]:
    return [
        Recorded(one.at_s, one.isl, one.osl, tuple(one.prefix_ids), one.prompt, tuple(one.messages))
        for one in _json_lines(path, _Own)
    ]


def _csv(path: Path, when: str, isl: str, osl: str, seconds: Callable[[str], float]) -> list[Recorded]:
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {when, isl, osl} - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; is dataset= the right one?")
        for row in reader:
            try:
                rows.append(Recorded(seconds(row[when]), int(float(row[isl])), int(float(row[osl]))))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _azure_seconds(text: str) -> float:
    """``2023-11-16 18:17:03.9799600``: seven digits, one more than datetime takes."""
    whole, _, fraction = text.strip().partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction.partition('+')[0] or 0}")


def _azure(path: Path) -> list[Recorded]:
    return _csv(path, "TIMESTAMP", "ContextTokens", "GeneratedTokens", _azure_seconds)


def _burstgpt(path: Path) -> list[Recorded]:
    """Requests that failed were recorded with no response tokens; they are left out."""
    return [one for one in _csv(path, "Timestamp", "Request tokens", "Response tokens", float) if one.osl > 0]


READERS: dict[str, Callable[[Path], list[Recorded]]] = {
    "mooncake": _mooncake,
    "azure": _azure,
    "burstgpt": _burstgpt,
    "trace": _own,
}
