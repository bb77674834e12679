"""dataset=random: texts of random words, ``isl`` tokens each, with nothing in common that a prefix cache could reuse.

How exact ``isl`` is depends on ``tokenizer``: ``bytes`` is exact; a folder with ``tokenizer.json`` is exact up to what
the tokenizer merges when the text is read back (the nearest length it can give); without one a word counts as a token,
which most tokenizers come near to. A chat template's own tokens come on top. What the server counted is in the results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.loadgen.datasets import Sample

# Short and frequent: one token each, with the space before, in any large vocabulary of English.
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know get through back"
)

MakeText = Callable[[random.Random], str]


class RandomWords:
    """Samples of about ``isl`` tokens; each one's words depend on the seed and its number."""

    def __init__(self, isl: int, seed: int, tokenizer: str) -> None:
        self.seed = seed
        self.make_text = _text_maker(isl, tokenizer)

    def __iter__(self) -> Iterator[Sample]:
        number = 0
        while True:
            rng = random.Random(f"{self.seed}/{number}")
            yield Sample(f"random-{number}", prompt=self.make_text(rng))
            number += 1


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS.split(), k=count))


def _text_maker(isl: int, tokenizer: str) -> MakeText:
    if not tokenizer:
        return lambda rng: _words(rng, isl)
    if tokenizer == "bytes":
        return lambda rng: _words(rng, isl)[:isl].ljust(isl, ".")
    return _tokenized(isl, Path(tokenizer).expanduser())


def _tokenized(isl: int, folder: Path) -> MakeText:
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    if not file.is_file():
        raise ValueError(f"tokenizer={folder}: {file} does not exist; give a folder with tokenizer.json, or `bytes`")
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(file))

    def make(rng: random.Random) -> str:
        ids = tokens.encode(_words(rng, isl), add_special_tokens=False).ids[:isl]
        return str(tokens.decode(ids))

    return make
