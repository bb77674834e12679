"""Both parts of a handoff in one process, without a model: what is read is right, and every block is given back.

A prefill and a decode scheduler with real caches and the real ``local`` transfer between them; a stand-in for the model
writes a hash of all tokens so far into each row, and checks the rows that it reads. Clients leave, blocks run out and
reads fail at random moments.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.engine.core import Batch, SamplingParams
from toolkit.engine.disagg.decode import DecodePart
from toolkit.engine.disagg.log import TransferLog
from toolkit.engine.disagg.part import Cache
from toolkit.engine.disagg.prefill import PrefillPart
from toolkit.engine.kv.kinds import LayerKind, first_token
from toolkit.engine.kv.layout import CacheLayout, regions
from toolkit.engine.kv.local import LocalTransfer
from toolkit.engine.kv.pool import KVCache, KVSpec
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.messages import Generate, Handover, Output, Receive, Send
from toolkit.engine.pipeline import Step
from toolkit.engine.scheduler import Scheduler

PAGE, MAX_LEN, WINDOWS = 4, 48, (0, 6)


class Side:
    """One rank: scheduler, cache, transfer."""

    def __init__(self, name: str, blocks: int, budget: int, prefix_cache: bool) -> None:
        kinds = [LayerKind(window, (i,), blocks) for i, window in enumerate(WINDOWS)]
        self.transfer = LocalTransfer(name)
        memory = lambda size: self.transfer.allocate(size, "cpu")  # noqa: E731
        self.cache = KVCache(KVSpec(1, 2, 0), kinds, PAGE, torch.float64, "cpu", memory)
        self.scheduler = Scheduler(BlockTables(kinds, PAGE, prefix_cache), budget, 5, MAX_LEN)
        layers = [list(kind.layers) for kind in kinds]
        self.layout = CacheLayout(PAGE, "float64", 1, 0, 1, 2, 0, list(WINDOWS), layers, [blocks] * len(kinds))
        self.kv = msgspec.msgpack.encode(Cache(self.layout, self.transfer.register(regions(self.cache))))

    def launch(self, batch: Batch) -> Callable[[], Step]:
        """The model: each token leaves its prefix's hash, and sees those before it; when what is returned is called."""
        began = time.monotonic()
        work = [
            (s.request.rid, s.begin, s.end, s.samples, list(s.request.tokens), [list(t) for t in s.request.blocks])
            for s in batch.scheduled
        ]
        in_flight = self.scheduler.advance(batch)

        def over() -> Step:
            for rid, begin, end, _, tokens, blocks in work:
                for kind, window in enumerate(WINDOWS):
                    rows = {at: self._row(kind, blocks[kind], at) for at in range(first_token(window, begin), end)}
                    for position in range(begin, end):
                        rows[position][:] = prefix_hash(tokens[: position + 1])
                    for position, row in rows.items():
                        assert float(row[0]) == prefix_hash(tokens[: position + 1]), f"{rid} reads another's KV"
            outputs = self.scheduler.resolve(in_flight, [next_token(tokens) for *_, s, tokens, _ in work if s])
            return Step(0, batch, 0.0, 0.0, outputs, began, in_flight.computed, lambda: None)

        return over

    def _row(self, kind: int, blocks: list[int], position: int) -> torch.Tensor:
        block = blocks[position // PAGE]
        assert block >= 0, f"no block for {position}"
        return self.cache.k[kind][block * PAGE + position % PAGE, 0]


def prefix_hash(tokens: list[int]) -> float:
    return float(hash(tuple(tokens)) % 2**50)


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % 50


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Pair:
    """A prefill and a decode rank, and a frontend's part between them."""

    def __init__(self, blocks: int, early: bool, ahead: bool) -> None:
        self.early, self.ahead = early, ahead
        self.under_way: Callable[[], Step] | None = None
        self.source, self.sink = Side("p", blocks, 7, True), Side("d", blocks, 12, False)
        self.prefill = PrefillPart(self.source.scheduler, self.source.transfer, self.source.kv, True, 60.0)
        log = TransferLog(None, "d", 0)
        self.decode = DecodePart(
            self.sink.scheduler, self.sink.transfer, self.sink.layout, 0, 60.0, log, lambda: lambda: True
        )
        self.got: dict[str, list[int]] = {}
        self.first: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.known: dict[str, tuple[list[int], SamplingParams, int]] = {}

    def send(self, rid: str, prompt: list[int], count: int) -> None:
        room, sampling = len(self.known), SamplingParams(max_tokens=count)
        self.known[rid], self.got[rid] = (prompt, sampling, room), []
        if self.early:
            receive = Receive(room, [self.source.kv])
            assert self.decode.take(Generate(rid, prompt, sampling, receive=receive)) is None
        assert self.prefill.take(Generate(rid, prompt, sampling, send=Send(room, self.early))) is None

    def leave(self, rid: str) -> None:
        self.ended.setdefault(rid, "left")
        self.prefill.abort(rid)
        self.decode.abort(rid)

    def turn(self) -> None:
        for part, side in ((self.prefill, self.source), (self.decode, self.sink)):
            arrived, lost = part.poll()
            ahead, told = self.ahead and part is self.prefill, list[Output]()
            if ahead and self.under_way is not None and not side.scheduler.can_run_ahead:
                told += part.stepped(self.under_way())
                self.under_way = None
            batch = side.scheduler.schedule()
            told += part.apply(arrived & ((1 << 62) - 1), lost)
            step: Callable[[], Step] | None = side.launch(batch)
            if ahead:  # the step before this one is over only now
                step, self.under_way = self.under_way, step
            if step is not None:
                told += part.stepped(step())
            for output in told:
                self.hear(output)
            if not ahead:  # a step under way has not let go of what lies behind windows
                side.scheduler.audit()

    def hear(self, output: Output) -> None:
        rid = output.rid
        if rid in self.ended:
            return
        prompt, sampling, room = self.known[rid]
        if output.finish == "error":
            assert output.retry, output.error
            self.leave(rid)
            self.ended[rid] = "failed"
        elif output.ticket is not None:
            if output.token_ids:
                self.first[rid] = output.token_ids[0]
            if self.early:
                self.decode.take(Handover(rid, output.ticket))
            else:
                receive = Receive(room, [self.source.kv], output.ticket)
                assert self.decode.take(Generate(rid, prompt, sampling, receive=receive)) is None
        else:
            self.got[rid] += [self.first[rid]] if output.joined else output.token_ids
            if output.finish:
                self.ended[rid] = output.finish
                if not output.joined and rid not in self.first:
                    self.decode.abort(rid)  # its first token was its last

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("early", [True, False], ids=["bootstrap", "synchronous"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(14, 40), faults=st.booleans())
def test_random_handoffs(early: bool, ahead: bool, seed: int, blocks: int, faults: bool) -> None:
    rng = random.Random(seed)
    pair = Pair(blocks, early, ahead)
    if faults:
        start: Any = pair.sink.transfer.start_read

        def sometimes(peer: str, rows: Any) -> Any:
            read = start(peer, rows)
            if rng.random() < 0.2:
                pair.sink.transfer.cancel(read)
            return read

        pair.sink.transfer.start_read = sometimes  # type: ignore[method-assign]
    deadline = time.monotonic() + 30
    turn = 0
    while turn < 60 or len(pair.ended) < len(pair.known) or pair.decode.busy or pair.prefill.busy:
        assert time.monotonic() < deadline, (pair.ended.keys() ^ pair.known.keys(), pair.source.scheduler.num_kept)
        if turn < 60 and rng.random() < 0.4:
            common = [3] * rng.choice([0, 0, 9])
            prompt = common + [rng.randrange(50) for _ in range(rng.randint(1, 25))]
            pair.send(f"r{turn}", prompt, rng.randint(1, 9))
        if rng.random() < 0.08 and (open_ := [rid for rid in pair.known if rid not in pair.ended]):
            pair.leave(rng.choice(open_))
        pair.turn()
        turn += 1
    for rid, (prompt, sampling, _) in pair.known.items():
        if pair.ended[rid] == "length":
            assert pair.got[rid] == expected(prompt, sampling.max_tokens)
    assert faults or "failed" not in pair.ended.values()
    for side in (pair.source, pair.sink):
        assert side.scheduler.num_kept == 0
        assert all(pool.num_free == pool.num_blocks for pool in side.scheduler.tables.pools), "blocks are missing"
    pair.close()
