"""When requests are sent. Knows neither HTTP nor what a request holds.

An arrival is given a load point's conversations (most have one call) and a ``send``; it decides when each call goes
out and says when it was due. Every process of the load generator has its own arrival with its own share: no call
waits for a word from another process. ``send`` returns when the call has ended, well or not.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from toolkit.loadgen.exchange import Call, Send

Conversation = Sequence[Call]
"""Calls of which each is sent after the answer to the one before."""


class Arrival(Protocol):
    """A way to send a load point's calls; returns when all have ended."""

    async def run(self, conversations: Sequence[Conversation], send: Send) -> None: ...


@dataclass
class ClosedLoop:
    """``concurrency`` slots, each of which goes on with the next conversation as soon as its last one has ended.

    The slots take conversations from one queue, in order. Warm-up calls are simply the first in it: the slot that
    ends one goes on with a measured one while others still warm up, so the measured part starts under full load and
    not with a burst of ``concurrency`` simultaneous prompts.

    Attributes:
        ramp_s: the slots begin spread evenly over so many seconds.
        offset, stride: which of all processes' slots these are: slot i begins at ramp_s * (offset + i * stride) /
            (all slots).
        full_ns: when the last slot had begun, and ``drained_ns``: when the first found nothing left to send. Between
            the two, ``concurrency`` calls should be in flight at any time.
    """

    concurrency: int
    ramp_s: float = 0.0
    offset: int = 0
    stride: int = 1
    full_ns: int = 0
    drained_ns: int = 0

    async def run(self, conversations: Sequence[Conversation], send: Send) -> None:
        queue = iter(conversations)

        async def slot(number: int) -> None:
            if self.ramp_s:
                share = (self.offset + number * self.stride) / (self.concurrency * self.stride)
                await asyncio.sleep(self.ramp_s * share)
            if number == self.concurrency - 1:
                self.full_ns = time.time_ns()
            for conversation in queue:
                await _converse(conversation, send, time.time_ns())
            self.drained_ns = self.drained_ns or time.time_ns()

        async with asyncio.TaskGroup() as slots:
            for number in range(self.concurrency):
                slots.create_task(slot(number))


@dataclass
class OpenLoop:
    """Each conversation begins at its first call's ``at_s``, whatever has become of those before.

    The schedule is absolute: a call that goes out late does not move the ones after it, and its ``scheduled_s`` says
    how late it was. With ``cap`` > 0, at most so many conversations are open; a due one waits for its turn inside
    the client, and stays due when it was.
    """

    cap: int = 0
    lag_ns: list[int] = field(default_factory=list)

    async def run(self, conversations: Sequence[Conversation], send: Send) -> None:
        begin_mono, begin_real = time.monotonic_ns(), time.time_ns()
        slots = asyncio.Semaphore(self.cap) if self.cap else None

        async def one(conversation: Conversation, due_ns: int) -> None:
            if slots is None:
                await _converse(conversation, send, due_ns)
                return
            async with slots:
                await _converse(conversation, send, due_ns)

        pacer = Pacer()
        try:
            async with asyncio.TaskGroup() as tasks:
                for conversation in conversations:
                    offset = round(conversation[0].at_s * 1e9)
                    await pacer.until(begin_mono + offset)
                    self.lag_ns.append(time.monotonic_ns() - begin_mono - offset)
                    tasks.create_task(one(conversation, begin_real + offset))
        finally:
            pacer.close()


async def _converse(conversation: Conversation, send: Send, due_ns: int) -> None:
    """Sends the turns in order, also those after one that failed: every call has to end in a row."""
    for call in conversation:
        if call.turn:
            due_ns = time.time_ns() + round(call.think_s * 1e9)
            await asyncio.sleep(call.think_s)
        await send(call, due_ns)


class Pacer:
    """Waits until a point on CLOCK_MONOTONIC, to some 50 µs: a timerfd, since the event loop's timers are in ms."""

    def __init__(self) -> None:
        self._fd = -1
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        if self._libc is not None:
            self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)

    async def until(self, deadline_ns: int) -> None:
        if time.monotonic_ns() >= deadline_ns:
            await asyncio.sleep(0)
            return
        if self._fd < 0:
            await asyncio.sleep((deadline_ns - time.monotonic_ns()) * 1e-9)
            return
        loop = asyncio.get_running_loop()
        rung: asyncio.Future[None] = loop.create_future()
        self._arm(deadline_ns)
        loop.add_reader(self._fd, self._ring, rung)
        try:
            await rung
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _arm(self, deadline_ns: int) -> None:
        assert self._libc is not None
        when = (ctypes.c_long * 4)(0, 0, deadline_ns // 1_000_000_000, deadline_ns % 1_000_000_000)
        absolute = 1
        if self._libc.timerfd_settime(self._fd, absolute, when, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _ring(self, rung: asyncio.Future[None]) -> None:
        os.read(self._fd, 8)
        if not rung.done():
            rung.set_result(None)


def conversations_of(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls grouped by session, in the order in which the conversations begin."""
    return list(_grouped(calls))


def _grouped(calls: Sequence[Call]) -> Iterator[list[Call]]:
    sessions: dict[str, list[Call]] = {}
    for call in calls:
        if call.session:
            sessions.setdefault(call.session, []).append(call)
    for call in calls:
        if not call.session:
            yield [call]
        elif call.turn == 0:
            yield sessions[call.session]
