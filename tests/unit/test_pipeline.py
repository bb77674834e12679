"""Steps launched ahead of results, through the real runner: tokens are taken from the device, texts do not change."""

from __future__ import annotations

import pytest

from tests.unit.frontend_peer import TINY_MIXTRAL
from toolkit.config import EngineConfig, ModelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.core import UNKNOWN, SamplingParams, StepContext
from toolkit.engine.inputs import LastTokens
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.runner import ModelRunner


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    hf = TINY_MIXTRAL | {"rms_norm_eps": 1e-6}
    model = ModelConfig(name="tiny", hf_config=hf, load_format="dummy", dtype="float32")
    return ModelRunner(model, read_arch(model), EngineConfig(page_size=4, max_total_tokens=240), Groups.single(), "cpu")


def texts(runner: ModelRunner, ahead: bool, params: list[SamplingParams]) -> tuple[dict[str, list[int]], int]:
    """What each request says, and how many steps were launched with a token still unknown."""
    scheduler, found, unknown = runner.new_scheduler(), {}, 0
    for i, p in enumerate(params):
        assert scheduler.add(str(i), [(7 * i + j) % 90 for j in range(5 + 3 * i)], p) is None

    def over(step: Step) -> None:
        for output in step.outputs:
            found.setdefault(output.rid, []).extend(output.token_ids)

    pipeline = Pipeline(runner, scheduler, ahead, over)
    for number in range(200):
        pipeline.before_schedule()
        batch = scheduler.schedule()
        if not batch.num_tokens:
            pipeline.drain()
            if scheduler.idle:
                return found, unknown
            continue
        unknown += any(s.request.tokens[s.end - 1] == UNKNOWN for s in batch.scheduled)
        rows = batch.num_logit_rows
        pipeline.launch(batch, StepContext(number, (batch.num_tokens,), (rows,), is_extend=bool(batch.prefill)))
    raise AssertionError("the requests did not end")


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
    stop = at_once["0"][4]
    params[0] = SamplingParams(max_tokens=12, stop_token_ids=(stop,))
    assert texts(runner, True, params)[0]["0"] == at_once["0"][: at_once["0"].index(stop) + 1]


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
