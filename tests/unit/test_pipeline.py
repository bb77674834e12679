"""Steps launched ahead of results, through the real runner: tokens are taken from the device, texts do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist import steps
from tests.unit.frontend_peer import TINY_MIXTRAL
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.core import UNKNOWN, Batch, Request, SamplingParams, ScheduledRequest
from toolkit.engine.graphs import bucket_sizes
from toolkit.engine.inputs import LastTokens, resolve_tokens, token_arrays
from toolkit.engine.parallel import Groups
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Scheduler
from toolkit.engine.staging import StaticInts, ints, to_device


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    hf = TINY_MIXTRAL | {"rms_norm_eps": 1e-6}
    model = ModelConfig(name="tiny", hf_config=hf, load_format="dummy", dtype="float32")
    return ModelRunner(model, read_arch(model), EngineConfig(page_size=4, max_total_tokens=240), Groups.single(), "cpu")


def texts(runner: ModelRunner, ahead: bool, params: list[SamplingParams]) -> tuple[list[list[int]], int]:
    prompts = [[(7 * i + j) % 90 for j in range(5 + 3 * i)] for i in range(len(params))]
    return steps.texts(runner, runner.groups, prompts, params, ahead)


def test_texts_are_the_same(runner: ModelRunner) -> None:
    params = [
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=5, temperature=1.0, seed=3),
        SamplingParams(max_tokens=9, temperature=0.7, top_p=0.8, top_k=20, seed=4),
    ]
    at_once, none = texts(runner, False, params)
    ahead, unknown = texts(runner, True, params)
    assert none == 0 and unknown >= 10
    assert ahead == at_once
    stop = at_once[0][4]
    params[0] = SamplingParams(max_tokens=12, stop_token_ids=(stop,))
    assert texts(runner, True, params)[0][0] == at_once[0][: at_once[0].index(stop) + 1]


def test_where_a_launch_waits_the_step_before_is_told_at_once(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a dispatcher that needs to know how many rows come: nothing is lost, and nobody waits for a prefill."""
    stop = SamplingParams(
        max_tokens=12, stop_token_ids=(texts(runner, False, [SamplingParams(max_tokens=5)])[0][0][4],)
    )
    params = [stop, SamplingParams(max_tokens=5, temperature=1.0, seed=3), SamplingParams(max_tokens=9)]
    at_once, _ = texts(runner, False, params)
    seen: list[str] = []
    launch, resolve = ModelRunner.launch, Scheduler.resolve

    def noted_launch(self: ModelRunner, *args: Any) -> Any:
        seen.append("launch")
        launched = launch(self, *args)
        seen.append("launched")
        return launched

    def noted_resolve(self: Scheduler, *args: Any) -> Any:
        seen.append("told")
        return resolve(self, *args)

    monkeypatch.setattr(ModelRunner, "launch", noted_launch)
    monkeypatch.setattr(Scheduler, "resolve", noted_resolve)
    monkeypatch.setattr(runner.moe.dispatcher, "capturable", lambda step: False)
    ahead, unknown = texts(runner, True, params)
    assert unknown >= 6 and ahead == at_once
    inside = [
        i for i, what in enumerate(seen) if what == "told" and seen[i - 1 : i + 2] == ["launch", "told", "launched"]
    ]
    assert len(inside) >= 6 and seen[:3] == ["launch", "launched", "launch"]


def test_penalties_wait_for_the_tokens_that_they_count(runner: ModelRunner) -> None:
    params = [SamplingParams(max_tokens=10, repetition_penalty=1.5), SamplingParams(max_tokens=10, logprobs=2)]
    at_once, _ = texts(runner, False, params)
    ahead, unknown = texts(runner, True, params)
    assert unknown == 0 and ahead == at_once


def test_last_tokens_forget_requests_that_a_step_did_not_sample(runner: ModelRunner) -> None:
    last = LastTokens(4, "cpu")
    scheduler = runner.new_scheduler()
    scheduler.add("a", [1, 2], SamplingParams())
    request = scheduler.schedule().scheduled[0].request
    last.sampled([request])
    assert last.row(request) == 0
    last.sampled([])
    with pytest.raises(KeyError):
        last.row(request)


def test_batch_buckets_end_with_the_largest_batch_and_waste_little() -> None:
    for most in (1, 3, 8, 100, 256, 700):
        sizes = bucket_sizes(most)
        assert sizes[-1] == most and list(sizes) == sorted(set(sizes))
        for batch in range(16, most + 1):
            bucket = next(size for size in sizes if size >= batch)
            assert bucket <= 1.5 * batch


def test_token_arrays_name_the_rows_of_unknown_tokens_and_pad() -> None:
    last = LastTokens(8, "cpu")
    last.values[:2] = torch.tensor([11, 12], dtype=torch.int32)
    requests = [Request(str(i), [1, 2, 3], 2, SamplingParams(), i, num_computed=2) for i in range(2)]
    requests[1].tokens[2] = UNKNOWN
    chunk = Request("p", [5, 6, 7, 8], 4, SamplingParams(), 2, num_computed=1)
    last.sampled([requests[0], requests[1]])
    batch = Batch(tuple(ScheduledRequest(r, 1) for r in requests), (ScheduledRequest(chunk, 2),))
    ids, positions, rows = token_arrays(batch, last, size=6)
    assert ids.tolist() == [3, 0, 6, 7, 0, 0]
    assert positions.tolist() == [2, 2, 1, 2, 0, 0]
    assert rows.tolist() == [-1, 1, -1, -1, -1, -1]
    ids_T, rows_T = to_device([ids, rows], "cpu")
    assert resolve_tokens(ids_T, rows_T, last).tolist() == [3, 12, 6, 7, 0, 0]


def test_static_ints_keep_their_place_and_their_shapes() -> None:
    static = StaticInts([(2,), (2, 3), (0,), (5,)], "cpu")
    before = [view.data_ptr() for view in static.views]
    given = [ints([4, 5]), ints([[1, 2, 3], [6, 7, 8]]), ints([]), ints([9] * 5)]
    static.fill(given)
    for views in (static.views, to_device(given, "cpu")):
        assert [v.tolist() for v in views] == [a.tolist() for a in given]
        assert [v.data_ptr() % 16 for v in views if len(v)] == [0, 0, 0], (
            "a kernel would be compiled for each alignment"
        )
    assert [view.data_ptr() for view in static.views] == before
    with pytest.raises(AssertionError, match="given for"):
        static.fill([ints([4]), *given[1:]])
