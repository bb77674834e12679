"""How a batch is cut in two, and in what order the stages of the halves run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.engine import EngineConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch_check import check
from toolkit.engine.core import Batch, Request, SamplingParams, ScheduledRequest
from toolkit.engine.dims import ParallelDims
from toolkit.engine.families import FAMILIES
from toolkit.engine.overlap import THRESHOLD, Stages, finish, interleave, split


def scheduled(name: str, computed: int, tokens: int) -> ScheduledRequest:
    request = Request(name, list(range(computed + tokens)), computed + tokens, SamplingParams(), 0)
    request.num_computed = computed
    return ScheduledRequest(request, tokens)


def batch(decode: int, prefill: list[int]) -> Batch:
    return Batch(
        tuple(scheduled(f"d{i}", 5, 1) for i in range(decode)),
        tuple(scheduled(f"p{i}", 3 * i, n) for i, n in enumerate(prefill)),
    )


def tokens(b: Batch) -> list[tuple[str, int]]:
    return [(s.request.rid, position) for s in b.scheduled for position in range(s.begin, s.end)]


@given(st.integers(0, 9), st.lists(st.integers(1, 40), max_size=5))
def test_halves_are_the_batch_in_order(decode: int, prefill: list[int]) -> None:
    whole = batch(decode, prefill)
    first, second = split(whole)
    assert tokens(first) + tokens(second) == tokens(whole)
    assert sum(s.samples for s in first.scheduled + second.scheduled) == whole.num_logit_rows
    if prefill and whole.num_tokens > 1:
        share = first.num_tokens / whole.num_tokens
        assert THRESHOLD <= share <= 1 - THRESHOLD or first.num_tokens == whole.num_tokens // 2


def test_decode_is_cut_between_requests() -> None:
    first, second = split(batch(7, []))
    assert (len(first.decode), len(second.decode)) == (3, 4)
    assert [half.num_tokens for half in split(batch(1, []))] == [0, 1]
    assert [half.num_tokens for half in split(batch(0, []))] == [0, 0]


def test_prefill_is_cut_between_requests_when_that_is_even_enough() -> None:
    first, second = split(batch(0, [50, 50]))
    assert [s.num_tokens for s in first.prefill] == [50] and [s.num_tokens for s in second.prefill] == [50]


def test_a_long_prompt_is_cut_in_two() -> None:
    first, second = split(batch(0, [10, 90]))
    assert [s.num_tokens for s in first.prefill] == [10, 40]
    (rest,) = second.prefill
    assert (rest.num_tokens, rest.offset, rest.begin, rest.end) == (50, 40, 43, 93)
    assert not first.prefill[1].samples and rest.samples


def stages(name: str, log: list[str], layers: int = 1) -> Stages:
    for _ in range(layers):
        for stage in ("prepared", "selected", "dispatched", "combining", "combined"):
            log.append(f"{name}:{stage}")
            yield stage  # type: ignore[misc]
        log.append(f"{name}:end")
    return torch.tensor(ord(name))


def test_prefill_halves_alternate_from_the_start() -> None:
    log: list[str] = []
    a, b = interleave(stages("a", log), stages("b", log), is_extend=True)
    assert (int(a), int(b)) == (ord("a"), ord("b"))
    upto = {half: [e for e in log if e.startswith(half)] for half in "ab"}
    assert [e.split(":")[1] for e in upto["a"]] == [e.split(":")[1] for e in upto["b"]]
    order = [e for e in log if e.split(":")[1] in ("dispatched", "combining", "end")]
    assert order == ["a:dispatched", "b:dispatched", "a:combining", "b:combining", "a:end", "b:end"]


def test_in_decode_the_first_half_leads_by_two() -> None:
    log: list[str] = []
    interleave(stages("a", log), stages("b", log), is_extend=False)
    assert log[:5] == ["a:prepared", "a:selected", "a:dispatched", "b:prepared", "a:combining"]
    assert log[-1] == "b:end"


def test_alone_all_stages_run() -> None:
    log: list[str] = []
    assert int(finish(stages("x", log, layers=3))) == ord("x") and len(log) == 18


@pytest.mark.parametrize(
    ("backend", "ep", "message"), [("allgather", 4, "allgather with ep_size=4"), ("all_to_all", 1, "ep_size=1")]
)
def test_a_backend_that_cannot_is_refused_with_the_reason(backend: str, ep: int, message: str) -> None:
    hf = {
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32,
        "max_position_embeddings": 64,
    }  # fmt: skip
    dims = ParallelDims.of(ParallelConfig(4, 4, ep, enable_dp_attention=True))
    options = EngineConfig(enable_two_batch_overlap=True, moe_a2a_backend=backend, max_running_requests=8)
    assert any(message in error for error in check(FAMILIES["mixtral"](hf), dims, options))
