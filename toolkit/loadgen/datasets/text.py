"""Texts of an exact number of tokens, from random short words: nothing in them that a prefix cache could reuse.

How exact depends on the tokenizer: ``bytes`` and a folder with ``tokenizer.json`` are exact (checked by encoding what
was made); without one a word counts as a token, which most tokenizers come near to. Works offline.
"""

from __future__ import annotations

import bisect
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Short and frequent: one token each, with the space before, in any large vocabulary of English.
_TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know get through back"
)
WORDS = tuple(_TEXT.split())
CHECKED = 16  # texts that are encoded again to see that word counts are token counts; from then on it is known
LETTERS = tuple("xqzjkvw")  # joined to the last word where no word fills what is missing


class TextMaker:
    """Makes texts; texts joined by a space have the sum of their lengths, too.

    Args:
        tokenizer: folder with ``tokenizer.json`` (or that file), ``bytes``, or empty: a word is a token.

    Raises:
        ValueError: there is no tokenizer at that place, or it cannot be read.
    """

    def __init__(self, tokenizer: str) -> None:
        self._bytes = tokenizer == "bytes"
        self._tokens = _load(Path(tokenizer).expanduser()) if tokenizer and not self._bytes else None
        self._words = WORDS
        self._to_check = 0
        if self._tokens is not None:
            one_token = [word for word in WORDS if self.count(f"of {word}") == 2 and self.count(word) == 1]
            self._words = tuple(one_token) or WORDS
            self._to_check = CHECKED

    @property
    def special_tokens(self) -> int:
        """Tokens that the tokenizer puts around a text of its own accord (begin of sequence)."""
        return self._tokens.num_special_tokens_to_add(False) if self._tokens is not None else 0

    def count(self, text: str) -> int:
        """Tokens of a text; words where there is no tokenizer."""
        if self._tokens is not None:
            return len(self._tokens.encode(text, add_special_tokens=False).ids)
        return len(text.encode()) if self._bytes else len(text.split())

    def make(self, rng: random.Random, count: int) -> str:
        """A text of ``count`` tokens."""
        if self._bytes:
            return " ".join(rng.choices(WORDS, k=count))[:count].ljust(count, ".")
        words = rng.choices(self._words, k=count)
        return self._fitted(words, count) if self._to_check else " ".join(words)

    def _fitted(self, words: list[str], count: int) -> str:
        """As many of the words as fit, filled up. As long as all fit exactly, word counts are known to be right."""
        text = " ".join(words)
        if self.count(text) == count:
            self._to_check -= 1
            return text
        self._to_check = sys.maxsize  # this tokenizer splits or merges words: look at every text
        fits = bisect.bisect_right(range(len(words) + 1), count, key=lambda n: self.count(" ".join(words[:n]))) - 1
        text = " ".join(words[:fits])
        while (has := self.count(text)) < count:
            longer = [f"{text} {word}".lstrip() for word in WORDS] + [text + letter for letter in LETTERS]
            sizes = {size: candidate for candidate in longer if has < (size := self.count(candidate)) <= count}
            if not sizes:
                break
            text = sizes[max(sizes)]
        return text


def _load(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    if not file.is_file():
        raise ValueError(f"tokenizer={folder}: {file} does not exist; give a folder with tokenizer.json, or `bytes`")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer={folder}: {file} is not a tokenizer: {error}") from None
