"""Properties of the scheduler under random arrivals, lengths, cancellations and shortages of blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.engine.core import Batch, Request, SamplingParams
from toolkit.engine.kv.kinds import LayerKind, first_token
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.scheduler import Scheduler

PAGE, MAX_LEN = 4, 40


def scheduler(
    blocks: int = 12,
    budget: int = 10,
    running: int = 6,
    prefix_cache: bool = True,
    windows: tuple[int, ...] = (0,),
    sliding_blocks: int = 12,
) -> Scheduler:
    """``windows``: of each kind of layer; those that slide have ``sliding_blocks``, the global one ``blocks``."""
    kinds = [LayerKind(window, (i,), sliding_blocks if window else blocks) for i, window in enumerate(windows)]
    return Scheduler(BlockTables(kinds, PAGE, prefix_cache), budget, running, MAX_LEN)


def next_token(tokens: list[int]) -> int:
    """A model: the next token depends on all before it, so a wrong or stale cache would show in the text."""
    return (sum(tokens) * 31 + len(tokens)) % 50


class CacheModel:
    """A stand-in for the KV cache: what is stored in each row of each kind of layer, checked when it is read."""

    def __init__(self, windows: tuple[int, ...] = (0,)) -> None:
        self.windows = windows
        self.rows: list[dict[int, int]] = [{} for _ in windows]
        self.prefixes: dict[str, list[int]] = {}

    def content(self, request: Request, kind: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(cache row, hash of all tokens up to it) of the positions begin..end-1."""
        hashes = self.prefixes.setdefault(request.rid, [0])
        for token in request.tokens[len(hashes) - 1 :]:
            hashes.append(hash((hashes[-1], token)))
        for position in range(begin, end):
            block = request.blocks[kind][position // PAGE]
            assert block >= 0, f"{request.rid} sees position {position}, whose block was freed"
            yield block * PAGE + position % PAGE, hashes[position + 1]

    def run(self, batch: Batch) -> list[int]:
        for kind, window in enumerate(self.windows):
            for s in batch.scheduled:
                begin = s.request.num_computed
                self.rows[kind].update(self.content(s.request, kind, begin, begin + s.num_tokens))
            for s in batch.scheduled:
                begin = first_token(window, s.request.num_computed)
                for row, content in self.content(s.request, kind, begin, s.request.num_computed + s.num_tokens):
                    assert self.rows[kind][row] == content, f"{s.request.rid} reads row {row}: another prefix's"
        return [next_token(s.request.tokens) for s in batch.scheduled if s.samples]


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(min(count, MAX_LEN - len(prompt))):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(MAX_LEN // PAGE, 40),
    budget=st.integers(6, 30),
    cache=st.booleans(),
    windows=st.sampled_from([(0,), (0, 6), (9,), (0, 8, 5), (0, 1)]),
    sliding_blocks=st.integers(4, 20),
)
def test_random_traffic(
    seed: int, blocks: int, budget: int, cache: bool, windows: tuple[int, ...], sliding_blocks: int
) -> None:
    """Every request ends exactly once with its own tokens, or was aborted; no block is leaked or shared wrongly."""
    rng = random.Random(seed)
    s, model = scheduler(blocks, budget, 6, cache, windows, sliding_blocks), CacheModel(windows)
    prompts: dict[str, tuple[list[int], int]] = {}
    got: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    waited = 0
    for step in range(4000):
        if step < 120 and rng.random() < 0.5:
            rid, common = f"r{step}", [7] * rng.choice([0, 0, 9, 17])
            prompt = common + [rng.randrange(50) for _ in range(rng.randint(1, 20))]
            count = rng.randint(1, 15)
            prompts[rid] = (prompt, count)
            got[rid] = []
            assert s.add(rid, prompt, SamplingParams(max_tokens=count)) is None
        if rng.random() < 0.05 and prompts:
            rid = rng.choice(list(prompts))
            s.abort(rid)
            ended.setdefault(rid, "aborted")
        if rng.random() < 0.02:
            s.flush_cache()
        batch = s.schedule()
        assert batch.num_tokens <= budget
        waited = waited + 1 if batch.num_tokens == 0 and not s.idle else 0
        assert waited == 0, "nothing was scheduled although requests are there"
        for output in s.finish(batch, model.run(batch)):
            assert output.rid not in ended, f"{output.rid} went on after its end"
            got[output.rid] += output.token_ids
            if output.finish:
                ended[output.rid] = output.finish
        s.audit()
        if step > 120 and s.idle:
            break
    assert s.idle and ended.keys() == prompts.keys()
    for rid, (prompt, count) in prompts.items():
        if ended[rid] != "aborted":
            assert got[rid] == expected(prompt, count)
    assert all(pool.num_free == pool.num_blocks for pool in s.tables.pools)


def drain(s: Scheduler, model: CacheModel) -> dict[str, list[int]]:
    got: dict[str, list[int]] = {}
    while not s.idle:
        batch = s.schedule()
        for output in s.finish(batch, model.run(batch)):
            got.setdefault(output.rid, []).extend(output.token_ids)
    return got


def test_prefix_is_reused_without_copies() -> None:
    s, model = scheduler(blocks=30), CacheModel()
    prompt = list(range(18))
    for rid in ("a", "b"):
        s.add(rid, prompt, SamplingParams(max_tokens=3))
        drain(s, model)
    assert s.stats.cached_tokens == 16 and s.stats.prompt_tokens == 36


def test_a_whole_prompt_in_the_cache_still_computes_one_token() -> None:
    s, model = scheduler(blocks=30), CacheModel()
    prompt = list(range(16))
    for rid in ("a", "b"):
        s.add(rid, prompt, SamplingParams(max_tokens=2))
        assert drain(s, model)[rid] == expected(prompt, 2)
    assert s.stats.cached_tokens == 12


def test_first_come_first_served_when_blocks_run_out() -> None:
    """The latest arrival gives way, comes back, and every text is as if it ran alone."""
    s, model = scheduler(blocks=11, budget=30), CacheModel()
    for i in range(3):
        s.add(f"r{i}", [i + 1] * 9, SamplingParams(max_tokens=20))
    got = drain(s, model)
    assert s.stats.preemptions > 0
    assert list(got) == ["r0", "r1", "r2"]
    assert all(got[f"r{i}"] == expected([i + 1] * 9, 20) for i in range(3))


def test_stop_token_and_limits() -> None:
    s, model = scheduler(), CacheModel()
    prompt = [1, 2, 3]
    stop = expected(prompt, 5)[2]
    s.add("stop", prompt, SamplingParams(max_tokens=5, stop_token_ids=(stop,)))
    assert drain(s, model)["stop"] == expected(prompt, 3)
    s.add("long", [1] * 30, SamplingParams(max_tokens=500))
    assert len(drain(s, model)["long"]) == MAX_LEN - 30


@pytest.mark.parametrize("length", [0, MAX_LEN, MAX_LEN + 5])
def test_impossible_prompts_are_refused(length: int) -> None:
    refused = scheduler().add("x", [1] * length, SamplingParams())
    assert refused is not None and refused.finish == "error" and str(length) in refused.error


def test_chunked_prefill_runs_beside_decode() -> None:
    s = scheduler(blocks=30, budget=8)
    model = CacheModel()
    s.add("short", [1, 2], SamplingParams(max_tokens=12))
    s.finish(batch := s.schedule(), model.run(batch))
    s.add("long", list(range(20)), SamplingParams(max_tokens=1))
    mixed = 0
    while not s.idle:
        batch = s.schedule()
        mixed += bool(batch.decode and batch.prefill)
        s.finish(batch, model.run(batch))
    assert mixed >= 3


def test_a_sliding_window_frees_blocks_and_keeps_its_prefix_while_they_last() -> None:
    """The prompt's last window is found again; one whose window was given away meanwhile is computed anew."""
    windows = (0, 8)
    s, model = scheduler(blocks=40, budget=40, windows=windows, sliding_blocks=14), CacheModel(windows)
    prompt = list(range(30))
    s.add("a", prompt, SamplingParams(max_tokens=2))
    s.finish(batch := s.schedule(), model.run(batch))
    in_use = [pool.num_blocks - pool.num_free for pool in s.tables.pools]
    assert in_use == [8, 3]  # 30 tokens in blocks of 4; positions 23 to 29, which the next query sees
    drain(s, model)
    s.add("b", prompt, SamplingParams(max_tokens=2))
    assert drain(s, model)["b"] == expected(prompt, 2)
    assert s.stats.cached_tokens == 28
    for first in (50, 90):  # together they need more sliding blocks than there are, and leave global ones over
        s.add(f"c{first}", list(range(first, first + 35)), SamplingParams(max_tokens=2))
        drain(s, model)
    s.add("d", prompt, SamplingParams(max_tokens=2))
    assert drain(s, model)["d"] == expected(prompt, 2)
    assert s.stats.cached_tokens == 28
    s.tables.audit([])
