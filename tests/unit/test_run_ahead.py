"""The scheduler one step ahead of its results: same tokens, same books, under shortage, stops and cancellations."""

from __future__ import annotations

import random

import pytest

from tests.unit.test_scheduler import MAX_LEN, PAGE, next_token, scheduler
from toolkit.engine.core import UNKNOWN, Batch, InFlight, SamplingParams
from toolkit.engine.scheduler import Scheduler


class Device:
    """Computes steps in the order of their launch; tokens still under way when a step was launched are its own."""

    def __init__(self) -> None:
        self.texts: dict[str, list[int]] = {}

    def run(self, batch: Batch) -> list[int]:
        sampled = []
        for s in batch.scheduled:
            request = s.request
            known = [token for token in request.tokens if token != UNKNOWN]
            text = self.texts.setdefault(request.rid, known)
            if len(text) < len(known):
                text[:] = known
            if s.samples:
                assert len(text) == len(request.tokens), f"{request.rid}: a token of an earlier step is missing"
                sampled.append(next_token(text))
                text.append(sampled[-1])
        return sampled


def serve(s: Scheduler, rng: random.Random, stops: tuple[int, ...], abort: float) -> tuple[dict, dict, int]:
    device, prompts, got, ended = Device(), {}, {}, {}
    in_flight: tuple[InFlight, list[int]] | None = None
    ahead = 0

    def resolve() -> None:
        nonlocal in_flight
        if in_flight is None:
            return
        step, tokens = in_flight
        in_flight = None
        for output in s.resolve(step, tokens):
            assert output.rid not in ended, f"{output.rid} went on after its end"
            got[output.rid] += output.token_ids
            if output.finish:
                ended[output.rid] = output.finish

    for step in range(2000):
        if step < 100 and rng.random() < 0.5:
            rid = f"r{step}"
            prompt = [7] * rng.choice([0, 9, 17]) + [rng.randrange(50) for _ in range(rng.randint(1, 15))]
            params = SamplingParams(max_tokens=rng.randint(1, 15), stop_token_ids=stops)
            prompts[rid], got[rid] = (prompt, params.max_tokens), []
            assert s.add(rid, prompt, params) is None
        if rng.random() < abort and prompts:
            rid = rng.choice(list(prompts))
            s.abort(rid)
            ended.setdefault(rid, "abort")
        if not s.can_run_ahead or rng.random() < 0.2:
            resolve()
            s.audit()  # of blocks behind a window, too, which a step gives back when it is resolved
        batch = s.schedule()
        launched = None
        if batch.num_tokens:
            tokens = device.run(batch)
            launched = s.advance(batch), tokens
            ahead += in_flight is not None
        resolve()
        in_flight = launched
        if step > 100 and s.idle and in_flight is None:
            break
    assert s.idle and ended.keys() == prompts.keys()
    assert all(pool.num_free == pool.num_blocks for pool in s.tables.pools)
    texts = {rid: (prompts[rid], got[rid]) for rid, how in ended.items() if how != "abort"}
    return texts, ended, ahead


def expected(prompt: list[int], count: int, stops: tuple[int, ...]) -> list[int]:
    text = list(prompt)
    while len(text) < min(len(prompt) + count, MAX_LEN):
        text.append(next_token(text))
        if text[-1] in stops:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("windows", [(0,), (0, 6)], ids=["global", "sliding"])
@pytest.mark.parametrize("blocks", [12, 60], ids=["few blocks", "many blocks"])
def test_texts_are_those_of_one_step_at_a_time(seed: int, windows: tuple[int, ...], blocks: int) -> None:
    stops = tuple(range(0, 50, 7))
    s = scheduler(blocks=blocks, windows=windows, sliding_blocks=blocks)
    texts, ended, ahead = serve(s, random.Random(seed), stops, abort=0.05)
    assert texts and ahead > 10, f"only {ahead} steps were launched ahead of a result"
    assert {"stop", "length"} <= set(ended.values())
    for (prompt, count), got in texts.values():
        assert got == expected(prompt, count, stops)


def test_a_length_is_known_before_the_last_token() -> None:
    """No step is wasted on a request whose last token is under way."""
    s = scheduler()
    s.add("a", [1] * (PAGE + 1), SamplingParams(max_tokens=2))
    first = s.advance(s.schedule())
    second = s.advance(s.schedule())
    assert [r.rid for r, _ in second.sampling] == ["a"]
    assert s.schedule().num_tokens == 0
    assert [o.finish for o in s.resolve(first, [5])] == [None]
    assert [o.finish for o in s.resolve(second, [6])] == ["length"]


def test_what_depends_on_earlier_tokens_is_not_run_ahead_of_them() -> None:
    for params in (SamplingParams(presence_penalty=0.5), SamplingParams(logprobs=0), SamplingParams(prompt_logprobs=1)):
        s = scheduler()
        s.add("a", [1], params)
        s.schedule()
        assert not s.can_run_ahead
    s = scheduler(blocks=60)
    s.add("a", [1], SamplingParams(temperature=1.0, top_p=0.5, logit_bias={3: 1.0}))
    s.schedule()
    assert s.can_run_ahead
