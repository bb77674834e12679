"""dataset=prompts: a JSON Lines file of prompts, one object a line.

``{"id": "...", "messages": [{"role", "content"}, ...]}`` or ``{"id": "...", "prompt": "..."}``. The bundled file was
written for this project: questions, instructions, code, maths, translation, stories, texts to work on, and some that
share a long system prompt, so that prefix reuse has something to find.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from toolkit.loadgen.datasets import Sample

BUNDLED = Path(__file__).with_name("prompts.jsonl")


class _Message(msgspec.Struct):
    role: str
    content: str


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    messages: list[_Message] | None = None
    prompt: str | None = None


class Prompts:
    """Every prompt of the file once, in seeded order, then all of them again in another order, and so on."""

    def __init__(self, path: str | Path, seed: int) -> None:
        self.samples = read_prompts(Path(path).expanduser())
        self.seed = seed

    def __iter__(self) -> Iterator[Sample]:
        order = random.Random(self.seed)
        while True:
            yield from order.sample(self.samples, len(self.samples))


def read_prompts(path: Path) -> list[Sample]:
    """All prompts of a file, in its order.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is not a prompt; says which line and why.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"dataset_path={path}: {error.strerror}; give a JSON Lines file, or leave it empty") from None
    samples = [_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise ValueError(f"dataset_path={path} holds no prompt; write one JSON object a line, with id and messages")
    twice = [a.id for a, b in zip(sorted(samples, key=_id), sorted(samples, key=_id)[1:]) if a.id == b.id]
    if twice:
        raise ValueError(f"{path}: id {twice[0]!r} is given twice; ids name the prompts in the results")
    return samples


def _id(sample: Sample) -> str:
    return sample.id


def _sample(line: bytes, where: str) -> Sample:
    try:
        prompt = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {error}") from None
    if bool(prompt.messages) == bool(prompt.prompt):
        raise ValueError(f"{where}: needs either messages or prompt, and not an empty one")
    messages = tuple({"role": m.role, "content": m.content} for m in prompt.messages or ())
    return Sample(prompt.id, messages, prompt.prompt or "")
