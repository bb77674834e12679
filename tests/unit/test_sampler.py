"""The sampler against transformers' processors, and its draws: distribution, seeds, independence of the batch."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.engine.core import Request, SamplingParams
from toolkit.engine.sampler import Sampler, gumbel, token_logprobs, warp

VOCAB = 97


def request(rid: str = "r", tokens: list[int] | None = None, prompt_len: int | None = None, **params: Any) -> Request:
    tokens = [1, 2, 3] if tokens is None else tokens
    return Request(rid, tokens, len(tokens) if prompt_len is None else prompt_len, SamplingParams(**params), 0)


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def by_transformers(logits_1V: Tensor, r: Request) -> Tensor:
    """Probabilities [V] that transformers' processors and warpers give, in its own order."""
    from transformers.generation import logits_process as hf

    p, ids = r.sampling, torch.tensor([r.tokens])
    chain: list[Any] = []
    if p.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.logit_bias:
        chain.append(hf.SequenceBiasLogitsProcessor([[[t], b] for t, b in p.logit_bias.items()]))
    if p.min_tokens and p.stop_token_ids:
        stops = torch.tensor(p.stop_token_ids)
        chain.append(hf.MinNewTokensLengthLogitsProcessor(r.prompt_len, p.min_tokens, stops))
    chain.append(hf.TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        chain.append(hf.TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(hf.TopPLogitsWarper(p.top_p))
    if p.min_p:
        chain.append(hf.MinPLogitsWarper(p.min_p))
    scores = logits_1V.double()
    for step in chain:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


def options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.05, 2), "top_k": st.integers(0, VOCAB + 5), "top_p": st.floats(0.01, 1),
            "min_p": st.floats(0, 1), "repetition_penalty": st.floats(0.1, 3), "min_tokens": st.integers(0, 8),
            "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
        },
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(each=st.lists(options(), min_size=1, max_size=6), seed=st.integers(0, 2**16))
def test_any_mix_of_options_gives_the_probabilities_of_transformers(each: list[dict[str, Any]], seed: int) -> None:
    """One batch, each request with options of its own: rows do not disturb each other."""
    rng = random.Random(seed)
    requests = []
    for i, params in enumerate(each):
        tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        filled = {"temperature": 1.0, "stop_token_ids": (5, 6)} | params
        requests.append(request(f"r{i}", tokens, rng.randint(1, len(tokens)), **filled))
    logits = random_logits(len(requests), seed)
    before = logits.clone()
    got = warp(Sampler().scores(logits, requests), [r.sampling for r in requests]).softmax(-1)
    assert torch.equal(logits, before), "the model's logits are still needed for logprobs"
    for i, r in enumerate(requests):
        torch.testing.assert_close(got[i], by_transformers(logits[i : i + 1], r), rtol=1e-4, atol=1e-6)


def test_presence_and_frequency_penalties_follow_openai_over_the_output_alone() -> None:
    logits, sampler = random_logits(2), Sampler()
    r = request("a", [4, 4, 9], 2, presence_penalty=0.5, frequency_penalty=0.25)  # prompt 4 4, output 9
    other = request("b")
    for output in ([9], [9, 4], [9, 4, 9], [9, 4, 9, 9, 1]):  # the history grows by any number of tokens
        r.tokens = [4, 4, *output]
        expected = logits.clone()
        for token in set(output):
            expected[0, token] -= 0.5 + 0.25 * output.count(token)
        torch.testing.assert_close(sampler.scores(logits, [r, other]), expected)


def test_what_is_remembered_of_a_request_goes_with_it() -> None:
    sampler, r = Sampler(), request(presence_penalty=1.0)
    sampler.scores(random_logits(1), [r])
    assert len(sampler._histories) == 1
    del r
    assert len(sampler._histories) == 0


DRAWS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.1, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("params", DRAWS, ids=str)
def test_draws_over_many_seeds_have_the_distribution(params: dict[str, Any]) -> None:
    """Pearson's chi-square against transformers' probabilities; no token that is ruled out is ever drawn."""
    logits, count, sampler = random_logits(1, scale=1.5), 8000, Sampler()
    drawn = np.zeros(VOCAB)
    for first in range(0, count, 500):
        requests = [request(f"r{s}", seed=s, **params) for s in range(first, first + 500)]
        np.add.at(drawn, sampler(logits.expand(500, -1), requests).tokens, 1)
    expected = by_transformers(logits, request(**params)).numpy() * count
    assert drawn[expected == 0].sum() == 0
    common = expected >= 5
    cells = np.append(drawn[common], drawn[~common].sum()), np.append(expected[common], expected[~common].sum())
    used = cells[1] > 0
    chi2 = float((((cells[0] - cells[1]) ** 2)[used] / cells[1][used]).sum())
    freedom = int(used.sum()) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5, (chi2, freedom)  # five sigma; the draws are fixed by the seeds


def test_positions_of_one_seed_are_independent_draws() -> None:
    logits, r, sampler = random_logits(1, scale=0.0), request(temperature=1.0, seed=3), Sampler()
    pairs = []
    for _ in range(600):
        token = sampler(logits, [r]).tokens[0]
        r.tokens.append(token)
        pairs.append(token)
    assert len(set(pairs)) > 90  # of 97, all equally likely
    assert sum(a == b for a, b in itertools.pairwise(pairs)) < 20  # 6 expected


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), rows=st.integers(1, 9), data=st.data())
def test_a_request_draws_the_same_alone_and_anywhere_in_a_batch(seed: int, rows: int, data: st.DataObject) -> None:
    params = {"temperature": 1.0, "seed": seed} | data.draw(options())
    params["temperature"] = max(params["temperature"], 0.1)
    logits = random_logits(rows, seed % 1000)
    at = data.draw(st.integers(0, rows - 1))
    alone = Sampler()(logits[at : at + 1], [request("me", **params)]).tokens[0]
    others = [data.draw(options()) for _ in range(rows)]
    batch = [request(f"r{i}", seed=i, **o) for i, o in enumerate(others)]
    batch[at] = request("me", **params)
    assert Sampler()(logits, batch).tokens[at] == alone


def test_rounding_of_the_logits_does_not_change_draws() -> None:
    """Batches and mappings differ in the last bits of a logit."""
    logits = random_logits(400, scale=1.0)
    requests = [request(f"r{s}", seed=s, temperature=1.0, top_p=0.95) for s in range(400)]
    nudged = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    a, b = Sampler()(logits, requests).tokens, Sampler()(nudged, requests).tokens
    assert sum(x != y for x, y in zip(a, b)) <= 1


def test_gumbel_noise_is_fixed_and_standard() -> None:
    """Its values are what a seed means: a change of them changes every seeded text."""
    noise = gumbel([(7, 0), (7, 1), (8, 0)], 50_000, torch.device("cpu"))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, rel=0.03)
    assert abs(torch.corrcoef(noise) - torch.eye(3)).max() < 0.02
    torch.testing.assert_close(noise[:, :2], gumbel([(7, 0), (7, 1), (8, 0)], 2, torch.device("cpu")))
    for token in (0, 1, 96, 49_999):
        uniform = (splitmix64(xxhash.xxh3_64_intdigest(b"7/0"), token) + 0.5) / 2**52
        assert noise[0, token].item() == pytest.approx(-math.log(-math.log(uniform)), abs=1e-12)


def splitmix64(state: int, index: int) -> int:
    """The upper 52 bits of the generator's value ``index``, in Python's integers (without the usual first step)."""
    x = (state + index * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) >> 12


def test_greedy_is_argmax_of_what_penalties_leave() -> None:
    logits = random_logits(3)
    best = logits.argmax(-1).tolist()
    assert Sampler()(logits, [request(str(i), temperature=t) for i, t in enumerate((0, 1e-9, 0))]).tokens == best
    banned = request(logit_bias={best[0]: -100.0})
    assert Sampler()(logits[:1], [banned]).tokens[0] == logits[0].topk(2).indices[1]


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    logits, sampler = torch.zeros(1, VOCAB), Sampler()
    logits[0, 5], logits[0, 6], logits[0, 8] = 9.0, 8.0, 7.0
    r = request(min_tokens=2, stop_token_ids=(5, 6))
    for expected in (8, 8, 5):
        r.tokens.append(sampler(logits, [r]).tokens[0])
        assert r.tokens[-1] == expected


def test_logprobs_are_the_models_own_whatever_the_options() -> None:
    logits = random_logits(3)
    requests = [
        request("a", logprobs=2, temperature=0.3, top_k=1, logit_bias={7: 100.0}),
        request("b"),
        request("c", logprobs=0, temperature=1.0, repetition_penalty=2.0),
    ]
    sampled = Sampler()(logits, requests)
    assert set(sampled.logprobs) == {"a", "c"} and sampled.tokens[0] == 7
    reference = logits.log_softmax(-1)
    top = reference[0].topk(2)
    entry = sampled.logprobs["a"]
    assert entry.logprob == pytest.approx(float(reference[0, 7]))
    assert entry.top_ids == top.indices.tolist() and entry.top_logprobs == pytest.approx(top.values.tolist())
    assert sampled.logprobs["c"].top_ids == []
    assert token_logprobs(logits, [0, 1, 2], [VOCAB + 9] * 3)[2].logprob == pytest.approx(float(reference[2, 2]))
