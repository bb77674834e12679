"""RouterPolicy: which DP rank takes a request, and the table of policies (``deploy.router``).

A policy sees tokens and the ranks' ``Stats``; it knows neither HTTP nor sockets. Same seed and same calls,
same picks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from toolkit.engine.messages import Stats
from toolkit.registry import Registry


class RouterPolicy(Protocol):
    def pick(self, tokens: list[int]) -> int:
        """The DP rank for a request with the prompt ``tokens``."""

    def observe(self, stats: Stats) -> None:
        """The state that a DP rank has just reported."""


RouterFactory = Callable[[int, int], RouterPolicy]  # (dp_size, seed)

ROUTERS: Registry[RouterFactory] = Registry("deploy.router")


@ROUTERS.register("round_robin")
def _round_robin(dp_size: int, seed: int) -> RouterPolicy:
    from toolkit.engine.frontend.router.round_robin import RoundRobin

    return RoundRobin(dp_size)
