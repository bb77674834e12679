"""Planning beside the engine: a process of its own that is asked for the next placement and answers when it has one.

A process, not a thread: planning holds the interpreter for milliseconds at a time, which a step would wait for. It ends
by itself when the rank that started it does. Messages are MessagePack over its pipes, nothing is unpickled.
Knows nothing of the running engine but what it is asked with. Read next: ``online.py``, ``schedule.py``.
L: layers, E: experts, R: slots.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.schedule import COLUMNS, Schedule

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


class Ask(msgspec.Struct, frozen=True):
    """What to plan.

    Attributes:
        counts: int64 [L, E], assignments counted since; empty without any.
        phy2log: int64 [L, R], in force.
        target: int64 [L, R], the placement to go to; empty: find the one that suits the counts.
        budget: largest share of the slots that may move.
        fresh: the placement in force was not planned: all of it may change.
        spare, layers_per_chunk: as in ``make_schedule``.
    """

    number: int
    layers: int
    counts: bytes
    phy2log: bytes
    target: bytes
    ranks: int
    groups: int
    nodes: int
    policy: str
    budget: float
    fresh: bool
    spare: int
    layers_per_chunk: int | None


class Answer(msgspec.Struct, frozen=True):
    """What was planned; every rank gets it.

    Attributes:
        error: why there is no plan; empty: there is one.
        phy2log: int64 [L, R], to go to; moves: int64 [M, C], ends: as in ``Schedule``.
        before, after: mean balancedness for the counts when replicas share evenly; bound: no placement is above it.
        moved, replanned, waiting: slots that need another expert; layers planned anew; layers left for next time.
        seconds: that planning took.
    """

    number: int
    error: str = ""
    phy2log: bytes = b""
    moves: bytes = b""
    ends: tuple[int, ...] = ()
    before: float = float("nan")
    after: float = float("nan")
    bound: float = float("nan")
    moved: int = 0
    replanned: int = 0
    waiting: int = 0
    seconds: float = 0.0

    def schedule(self) -> Schedule:
        return Schedule(np.frombuffer(self.moves, np.int64).reshape(-1, len(COLUMNS)), self.ends)

    def placement(self, layers: int) -> Ints:
        return np.frombuffer(self.phy2log, np.int64).reshape(layers, -1)


class Planning:
    """The asking side. ``ask``, then ``answer`` until it is not None; one question at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def start(self) -> subprocess.Popen[bytes]:
        """The process, started if there is none (any more): what it compiles is then there when it is asked."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "toolkit.engine.eplb.planning"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def ask(self, ask: Ask) -> None:
        """Starts planning."""
        process = self.start()
        threading.Thread(target=self._exchange, args=(process, ask), name="eplb-planning", daemon=True).start()

    def answer(self) -> Answer | None:
        """The answer, once. An answer with ``error`` where planning failed."""
        with contextlib.suppress(queue.Empty):
            return self._answers.get_nowait()
        return None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _exchange(self, process: subprocess.Popen[bytes], ask: Ask) -> None:
        assert process.stdin is not None and process.stdout is not None
        try:
            _write(process.stdin, msgspec.msgpack.encode(ask))
            answer = msgspec.msgpack.decode(_read(process.stdout), type=Answer)
        except (OSError, EOFError, msgspec.DecodeError) as error:
            answer = Answer(ask.number, error=f"the planning process ended: {error or type(error).__name__}")
        self._answers.put(answer)


def plan_update(ask: Ask) -> Answer:
    """Answers one question.

    Raises:
        ValueError: as ``online.update``.
    """
    import time

    from toolkit.engine.eplb import maps
    from toolkit.engine.eplb.relabel import moved
    from toolkit.engine.eplb.schedule import make_schedule

    begin = time.perf_counter()
    old = np.frombuffer(ask.phy2log, np.int64).reshape(ask.layers, -1)
    counts = np.frombuffer(ask.counts, np.int64).reshape(ask.layers, -1)
    new, bound, replanned, waiting = _next(ask, old, counts)
    before = after = float("nan")
    if counts.size:
        loads = [maps.gpu_loads(counts, placement, ask.ranks) for placement in (old, new)]
        before, after = (maps.mean_balancedness(maps.balancedness(load)) for load in loads)
    schedule = make_schedule(old, new, ask.ranks, ask.nodes, ask.spare, ask.layers_per_chunk)
    return Answer(
        ask.number, "", new.tobytes(), schedule.moves_MC.tobytes(), schedule.ends, before, after, bound,
        int(moved(old, new, ask.ranks).sum()), replanned, waiting, time.perf_counter() - begin,
    )  # fmt: skip


def _next(ask: Ask, old: Ints, counts: Ints) -> tuple[Ints, float, int, int]:
    """The next placement, its bound, the layers planned anew, and those that have to wait."""
    from toolkit.engine.eplb import maps
    from toolkit.engine.eplb.online import Rules, update
    from toolkit.engine.eplb.planner import plan

    if ask.target:
        return np.frombuffer(ask.target, np.int64).reshape(old.shape), float("nan"), 0, 0
    if ask.fresh and ask.policy != "global":  # single moves would not make it keep the policy's rule
        planned = plan(counts, old.shape[1], ask.groups, ask.nodes, ask.ranks, old, ask.policy)
        return planned.phy2log_LR, maps.mean_balancedness(planned.bound_L), len(old), 0
    rules = Rules(budget=1.0 if ask.fresh else ask.budget)
    found = update(counts, old, ask.ranks, rules, ask.groups, ask.nodes, ask.policy)
    bound = maps.mean_balancedness(found.bound_L)
    return found.phy2log_LR, bound, int(found.replanned_L.sum()), int(found.waiting_L.sum())


def _warm_up() -> None:
    """Compiles what a plan needs, or reads it from the cache, before the first question."""
    counts = np.arange(1, 17, dtype=np.int64)[None] ** 4
    phy2log = np.arange(20, dtype=np.int64)[None] % 16
    for fresh in (True, False):
        plan_update(Ask(0, 1, counts.tobytes(), phy2log.tobytes(), b"", 4, 4, 2, "global", 0.05, fresh, 5, None))


def main() -> None:
    """Answers questions from standard input until it ends."""
    with contextlib.suppress(OSError):
        os.nice(10)  # the engine goes first
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get among the answers
    _warm_up()
    while True:
        try:
            ask = msgspec.msgpack.decode(_read(questions), type=Ask)
        except EOFError:
            return
        try:
            answer = plan_update(ask)
        except Exception as error:
            log.exception("planning failed")
            answer = Answer(ask.number, error=f"{type(error).__name__}: {error}")
        _write(answers, msgspec.msgpack.encode(answer))


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    size = int.from_bytes(_exactly(pipe, 8), "little")
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError("the pipe was closed")
    return data


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    main()
