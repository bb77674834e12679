"""Round robin: DP ranks in turn, from rank 0, whatever they report."""

from __future__ import annotations

from toolkit.engine.messages import Stats


class RoundRobin:
    def __init__(self, dp_size: int) -> None:
        self._dp_size = dp_size
        self._next = 0

    def pick(self, tokens: list[int]) -> int:
        picked = self._next
        self._next = (picked + 1) % self._dp_size
        return picked

    def observe(self, stats: Stats) -> None:
        """Nothing is learnt from it."""
