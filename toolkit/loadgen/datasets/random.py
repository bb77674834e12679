"""dataset=random: conversations and texts of random words, of given lengths, with or without shared prefixes.

Each sample depends on the seed and its number only. A chat template's own tokens come on top of ``isl``.
"""

from __future__ import annotations

import base64
import mimetypes
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolkit.config.load import LoadConfig
from toolkit.loadgen.datasets import Sample
from toolkit.loadgen.datasets.text import TextMaker


class RandomText:
    """Samples of ``isl`` tokens, ``turns`` of them a conversation; the first ``prefix_len`` from a pool of prefixes."""

    def __init__(self, load: LoadConfig, tokenizer: str) -> None:
        self._load = load
        self._text = TextMaker(tokenizer)
        self._fixed = self._text.special_tokens if load.endpoint == "completions" else 0
        self._image = image_part(Path(load.image).expanduser()) if load.image else None
        self._prefix = lru_cache(maxsize=1024)(self._make_prefix)

    def __iter__(self) -> Iterator[Sample]:
        number = 0
        while True:
            yield from self._conversation(number)
            number += 1

    def _conversation(self, number: int) -> Iterator[Sample]:
        load = self._load
        rng = random.Random(f"{load.seed}/{number}")
        for turn in range(load.turns):
            name = f"random-{number}" if load.turns == 1 else f"random-{number}.{turn}"
            isl = spread(rng, load.isl, load.isl_stddev, load.range_ratio)
            osl = spread(rng, load.osl, load.osl_stddev, load.range_ratio)
            text = self._prompt(rng, isl - self._fixed, shared=turn == 0)
            yield Sample(
                name,
                messages=_with_image(text, self._image) if self._image else (),
                prompt="" if self._image else text,
                output_tokens=osl if osl != load.osl else 0,
                session=f"s{number}" if load.turns > 1 else "",
                more_turns=turn + 1 < load.turns,
                think_s=load.think_s,
            )

    def _prompt(self, rng: random.Random, count: int, shared: bool) -> str:
        count = max(1, count)
        length = min(self._load.prefix_len, count - 1) if shared else 0
        if not length:
            return self._text.make(rng, count)
        prefix = self._prefix(rng.randrange(self._load.num_prefixes), length)
        return f"{prefix} {self._text.make(rng, count - length - self._joint)}"

    @property
    def _joint(self) -> int:
        """Tokens of the space between two texts."""
        return self._text.count("of of") - 2 * self._text.count("of")

    def _make_prefix(self, number: int, length: int) -> str:
        return self._text.make(random.Random(f"{self._load.seed}/prefix/{number}"), length)


def spread(rng: random.Random, mean: int, stddev: float, ratio: float) -> int:
    """A length around ``mean``: normal, or even within ``ratio`` of it; at least 1."""
    if stddev:
        return max(1, round(rng.gauss(mean, stddev)))
    if ratio:
        return max(1, round(rng.uniform(mean * (1 - ratio), mean * (1 + ratio))))
    return mean


def image_part(file: Path) -> dict[str, Any]:
    """An image file as a part of a chat message, inside the request (data URL).

    Raises:
        ValueError: it cannot be read, or its name does not say that it is an image.
    """
    kind = mimetypes.guess_type(file.name)[0] or ""
    if not kind.startswith("image/"):
        raise ValueError(f"image={file} is not an image by its name; give a .png, .jpg or .webp file")
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise ValueError(f"image={file}: {error.strerror}; give a file you may read") from None
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def _with_image(text: str, image: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": [image, {"type": "text", "text": text}]},)
