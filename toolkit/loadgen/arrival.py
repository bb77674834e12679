"""When requests are sent. Knows neither HTTP nor what a request holds.

An arrival is given all calls of a load point and a ``send``; it decides when each goes out and says when it was due.
``send`` never raises for a request that failed (client.py turns that into the request's row).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

Send = Callable[[T, float], Awaitable[None]]
"""(call, when it was due on ``time.perf_counter``) -> returns when the call has ended."""


class Arrival(Protocol):
    """A way to send a load point's calls; returns when all have ended."""

    async def run(self, calls: Sequence[T], send: Send[T]) -> None: ...


@dataclass(frozen=True)
class ClosedLoop:
    """``concurrency`` slots, each of which sends its next call as soon as its last one has ended.

    The slots take calls from one queue, in order. Warm-up calls are simply the first in it: the slot that ends one
    goes on with a measured one while others still warm up, so the measured part starts under full load and not with
    a burst of ``concurrency`` simultaneous prompts.
    """

    concurrency: int

    async def run(self, calls: Sequence[T], send: Send[T]) -> None:
        queue = iter(calls)

        async def slot() -> None:
            for call in queue:
                await send(call, time.perf_counter())

        async with asyncio.TaskGroup() as slots:
            for _ in range(self.concurrency):
                slots.create_task(slot())
