"""The closed loop: slots stay full, in order, and warm-up flows into the measured part."""

from __future__ import annotations

import asyncio

import pytest

from toolkit.loadgen.arrival import ClosedLoop
from toolkit.loadgen.exchange import Call, Exchange


def calls_of(*names: str) -> list[list[Call]]:
    return [[Call(name, name, False, 0, 0, 0)] for name in names]


class Calls:
    """Stands for the server's side: each call is open until the test ends it."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Event] = {}
        self.begun: list[str] = []
        self.most = 0

    async def send(self, call: Call, due_ns: int) -> Exchange:
        name = call.request_id
        self.begun.append(name)
        self.open[name] = asyncio.Event()
        self.most = max(self.most, len(self.open))
        await self.open[name].wait()
        del self.open[name]
        return Exchange(call, due_ns)

    async def end(self, call: str) -> None:
        self.open[call].set()
        for _ in range(3):
            await asyncio.sleep(0)


def test_warm_up_is_handed_over_without_a_pause() -> None:
    async def run() -> None:
        calls = Calls()
        loop = asyncio.create_task(ClosedLoop(2).run(calls_of("warm-0", "warm-1", "a", "b", "c"), calls.send))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert list(calls.open) == ["warm-0", "warm-1"]
        await calls.end("warm-1")
        assert set(calls.open) == {"warm-0", "a"}, "a measured call starts while the other slot still warms up"
        await calls.end("a")
        await calls.end("b")
        assert set(calls.open) == {"warm-0", "c"}
        await calls.end("warm-0")
        assert not loop.done(), "it waits for the last one"
        await calls.end("c")
        await loop
        assert calls.begun == ["warm-0", "warm-1", "a", "b", "c"]

    asyncio.run(run())


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_concurrency_is_held_and_not_exceeded(concurrency: int) -> None:
    open_now, seen = 0, []

    async def send(call: Call, due_ns: int) -> Exchange:
        nonlocal open_now
        open_now += 1
        seen.append(open_now)
        await asyncio.sleep(0.001 * (int(call.request_id) % 3))
        open_now -= 1
        return Exchange(call, due_ns)

    asyncio.run(ClosedLoop(concurrency).run(calls_of(*map(str, range(40))), send))
    assert seen == [*range(1, concurrency), *[concurrency] * (41 - concurrency)]


def test_more_slots_than_calls() -> None:
    done = []

    async def send(call: Call, due_ns: int) -> Exchange:
        done.append(call.request_id)
        return Exchange(call, due_ns)

    asyncio.run(ClosedLoop(8).run(calls_of("1", "2"), send))
    assert done == ["1", "2"]
