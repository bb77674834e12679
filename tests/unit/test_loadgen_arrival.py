"""The closed loop: slots stay full, in order, and warm-up flows into the measured part."""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np
import pytest

from toolkit.config.load import LoadConfig
from toolkit.config.mapping import from_mapping
from toolkit.loadgen.arrival import ClosedLoop, OpenLoop, conversations_of
from toolkit.loadgen.exchange import Call, Exchange
from toolkit.loadgen.points import Search, due_times


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


def timed(*at_s: float) -> list[list[Call]]:
    return [[Call(str(number), "p", False, 0, 0, 0, at_s=at)] for number, at in enumerate(at_s)]


def test_an_open_loop_does_not_wait_for_answers() -> None:
    sent: dict[str, tuple[int, int]] = {}
    release = asyncio.Event()

    async def send(call: Call, due_ns: int) -> Exchange:
        sent[call.request_id] = (time.time_ns(), due_ns)
        if len(sent) == 4:
            release.set()
        await release.wait()
        return Exchange(call, due_ns)

    asyncio.run(OpenLoop().run(timed(0, 0.01, 0.01, 0.05), send))
    assert list(sent) == ["0", "1", "2", "3"]
    begin = sent["0"][1]
    assert [due - begin for _, due in sent.values()] == [0, 10_000_000, 10_000_000, 50_000_000]
    assert all(at >= due - 1_000_000 for at, due in sent.values()), "never early"


def test_a_capped_open_loop_keeps_due_times() -> None:
    open_now, most, due = 0, 0, []

    async def send(call: Call, due_ns: int) -> Exchange:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        due.append(due_ns)
        await asyncio.sleep(0.02)
        open_now -= 1
        return Exchange(call, due_ns)

    asyncio.run(OpenLoop(cap=2).run(timed(0, 0, 0, 0, 0.001), send))
    assert most == 2
    assert [d - due[0] for d in due] == [0, 0, 0, 0, 1_000_000], "waiting in the client does not move when it was due"


def test_turns_follow_each_other() -> None:
    log = []

    async def send(call: Call, due_ns: int) -> Exchange:
        log.append(("begin", call.request_id))
        await asyncio.sleep(0.001)
        log.append(("end", call.request_id))
        return Exchange(call, due_ns)

    calls = [
        Call("a0", "p", False, 0, 0, 0, session="a"),
        Call("a1", "p", False, 0, 0, 0, session="a", turn=1, think_s=0.01),
        Call("x", "p", False, 0, 0, 0),
    ]
    assert [[c.request_id for c in group] for group in conversations_of(calls)] == [["a0", "a1"], ["x"]]
    asyncio.run(ClosedLoop(2).run(conversations_of(calls), send))
    assert log.index(("end", "a0")) < log.index(("begin", "a1"))


def test_slots_begin_over_the_ramp() -> None:
    begun = []

    async def send(call: Call, due_ns: int) -> Exchange:
        begun.append(due_ns)
        return Exchange(call, due_ns)

    asyncio.run(ClosedLoop(3, ramp_s=0.3).run(calls_of("a", "b", "c"), send))
    first_slot_takes_all = [due - begun[0] for due in begun]
    assert first_slot_takes_all[-1] < 0.1e9, "a free slot goes on with the queue"
    loop = ClosedLoop(2, ramp_s=0.1, offset=1, stride=2)
    asyncio.run(loop.run([], send))
    assert loop.full_ns > 0


@pytest.mark.parametrize(("arrival", "cv"), [("constant", 0.0), ("poisson", 1.0), ("gamma", 2.0)])
def test_gaps_have_the_rate_and_spread_asked_for(arrival: str, cv: float) -> None:
    load = from_mapping({"arrival": arrival, "burstiness": 0.25}, LoadConfig)
    times = np.array(list(itertools.islice(due_times(load, 8.0, 1), 20_000)))
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.1)
    assert list(itertools.islice(due_times(load, 8.0, 1), 50)) == times[:50].tolist(), "the seed decides"


def test_a_ramped_rate_grows_from_zero_to_the_rate() -> None:
    load = from_mapping({"arrival": "constant", "ramp_s": 10.0}, LoadConfig)
    times = np.array(list(itertools.islice(due_times(load, 100.0, 0), 2000)))
    counts, _ = np.histogram(times, bins=[0, 2, 4, 6, 8, 10, 12, 14])
    assert counts == pytest.approx([20, 60, 100, 140, 180, 200, 200], abs=3)


@pytest.mark.parametrize("limit", [0, 1, 7, 64, 200, 999, 1000])
def test_the_search_ends_at_the_largest_good_load(limit: int) -> None:
    search = Search(LoadConfig(concurrency=[1, 1000], search=True, slo_ttft_ms=1))
    tried = []
    while (point := search.next()) is not None:
        tried.append(point.concurrency)
        search.tell(point.concurrency <= limit)
    assert len(tried) == len(set(tried)) < 14
    assert [index for index, _ in enumerate(tried)] == list(range(len(tried)))
    assert search.best <= limit
    assert limit <= search.best * Search.CLOSE


def test_the_search_over_rates() -> None:
    search = Search(LoadConfig(request_rate=[0.5, 50.0], search=True, slo_ttft_ms=1))
    while (point := search.next()) is not None:
        assert point.open_loop
        search.tell(point.request_rate <= 7.3)
    assert 7.3 / Search.CLOSE <= search.best <= 7.3
