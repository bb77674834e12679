"""Flights: what the handler of an HTTP request sees of the workers, wherever they are.

``Serving`` takes a prompt and gives a ``Flight``, which starts requests; their outputs are put into a ``Sink``, here a
``Mailbox`` that the handler reads. Next to the ranks ``Serving`` is ``fleet.Fleet``; in an API server of its own it is
``relay.RelayedFleet``. Read next: ``generate.py``, ``fleet.py``.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.messages import Output

State = Literal["loading", "ready", "failed"]


class Sink(Protocol):
    """Where the outputs of requests go. A request's last output has ``finish``."""

    def put(self, output: Output) -> None: ...


class Flight(Protocol):
    """Requests of one prompt, on the DP rank ``label`` of its pool (known when the first output has come)."""

    @property
    def label(self) -> int: ...

    def send(self, rid: str, sampling: SamplingParams) -> None:
        """Starts a request."""

    def abort(self, rid: str) -> None:
        """Ends a request, unless it has ended."""


class Serving(Protocol):
    """The workers, as far as completions need them.

    Attributes:
        failure: why nothing can be served; empty while it can, or may soon.
    """

    @property
    def state(self) -> State: ...

    @property
    def failure(self) -> str: ...

    def admit(self, num_requests: int) -> None:
        """``ApiError`` 503 when so many more cannot be taken now."""

    def info_min(self, key: str) -> int:
        """The smallest value of a figure that ranks gave with ``Ready``, among those that hold whole requests."""

    def flight(self, prompt: list[int], num_requests: int, mailbox: Mailbox) -> AbstractContextManager[Flight]:
        """For up to ``num_requests`` of one prompt. Leaving the block aborts those that have not ended."""

    async def fail(self, reason: str) -> None:
        """Ends everything with ``reason``, for good."""

    async def close(self) -> None: ...


class Mailbox:
    """A ``Sink`` with one reader, in order."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Output | ApiError] = asyncio.Queue()

    def put(self, output: Output) -> None:
        self._queue.put_nowait(output)

    def refuse(self, error: ApiError) -> None:
        """There will be no outputs: ``next`` raises it."""
        self._queue.put_nowait(error)

    async def next(self) -> Output:
        found = await self._queue.get()
        if isinstance(found, ApiError):
            raise found
        return found

    @property
    def waiting(self) -> bool:
        """Whether ``next`` has something already."""
        return not self._queue.empty()
