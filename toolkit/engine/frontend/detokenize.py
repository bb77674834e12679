"""Token ids -> text, as they come: no half characters, no half stop strings.

``TextStream`` is what a tokenizer offers for one request; ``Detokenizer`` puts stop strings on top.
Knows neither HTTP nor ranks. Read next: ``tokenizer.py``.
"""

from __future__ import annotations

from typing import Protocol


class TextStream(Protocol):
    """Text of one request's tokens. The pieces, joined, are the text of all tokens."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end; an incomplete character becomes U+FFFD."""


class StopMatcher:
    """Passes text on up to the first stop string, and withholds what may be the beginning of one.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first wins,
    the longest of those that end together.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops), stops
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        assert not self.stopped, "text after the stop string"
        if not self._stops:
            return text
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._prefix_len())

    def flush(self) -> str:
        """The withheld text, once it is known that nothing follows."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], "" if self.stopped else self._held[count:]
        return text

    def _prefix_len(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


class Detokenizer:
    """One request's output.

    Args:
        min_tokens: stop strings are looked for in the text after so many tokens only.

    Attributes:
        num_tokens: taken so far.
        num_chars: characters of their text, shown or withheld.
        stopped: by a stop string.
    """

    def __init__(self, stream: TextStream, stops: tuple[str, ...], min_tokens: int = 0) -> None:
        self._stream, self._min_tokens = stream, min_tokens
        self._matcher = StopMatcher(stops)
        self.num_tokens = self.num_chars = 0

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """Text that may be shown now. No token may follow the one that completes a stop string."""
        self.num_tokens += 1
        text = self._stream.push(token)
        self.num_chars += len(text)
        return text if self.num_tokens <= self._min_tokens else self._matcher.push(text)

    def finish(self, silent_tokens: int = 0) -> str:
        """The rest of the text. ``silent_tokens`` are generated tokens that have no text: the end token."""
        self.num_tokens += silent_tokens
        shown = self._matcher.push(self._stream.flush())
        return shown if self.stopped else shown + self._matcher.flush()
