"""Logprobs of a prompt from the runner: chunks, prefix cache and preemption change nothing in them."""

from __future__ import annotations

import pytest
import torch

from tests.unit.frontend_peer import TINY_MIXTRAL, VOCAB
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine import runner as runner_module
from toolkit.engine.arch import read_arch
from toolkit.engine.core import Batch, Request, SamplingParams, ScheduledRequest, StepContext
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.messages import Output
from toolkit.engine.parallel import Groups
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Scheduler

PAGE, BLOCKS = 4, 60
PROMPT = [(37 * i + 11) % VOCAB for i in range(30)]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    model = ModelConfig(
        name="tiny", hf_config=TINY_MIXTRAL | {"rms_norm_eps": 1e-6}, load_format="dummy", dtype="float32"
    )
    engine = EngineConfig(page_size=PAGE, max_total_tokens=PAGE * BLOCKS)
    return ModelRunner(model, read_arch(model), engine, Groups.single(), "cpu")


def reference(runner: ModelRunner) -> list[float]:
    """All tokens in one pass, through no scheduler."""
    request = Request("all", PROMPT, len(PROMPT), SamplingParams(), 0, blocks=[list(range(BLOCKS))])
    batch = Batch(prefill=(ScheduledRequest(request, len(PROMPT)),))
    hidden = runner.hidden(batch, StepContext(0, (len(PROMPT),), (0,), is_extend=True))
    logprobs = runner.model.logits(hidden, (len(PROMPT),)).log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()


def steps(runner: ModelRunner, scheduler: Scheduler, preempt_after: int = -1) -> list[Output]:
    outputs: list[Output] = []
    for step in range(100):
        if scheduler.idle:
            return outputs
        batch = scheduler.schedule()
        sampled = runner.step(
            batch, StepContext(step, (batch.num_tokens,), (batch.num_logit_rows,), is_extend=bool(batch.prefill))
        )
        outputs += scheduler.finish(batch, sampled.tokens, sampled.logprobs)
        if step == preempt_after:
            scheduler._preempt(next(iter(scheduler._running.values())))
    raise AssertionError("the request did not end")


@pytest.mark.parametrize("preempt_after", [-1, 0, 2, 5], ids=lambda step: f"preempted after step {step}")
@pytest.mark.parametrize("budget", [7, 64])
def test_they_are_those_of_one_pass(
    runner: ModelRunner, budget: int, preempt_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "LOGIT_ROWS", 5)
    expected = reference(runner)
    scheduler = Scheduler(BlockTables(runner.cache.kinds, PAGE), budget, 4, 64)
    for rid in ("first", "again"):  # the second finds its whole prompt in the prefix cache, and must not use it
        scheduler.add(rid, PROMPT, SamplingParams(max_tokens=8, logprobs=0, prompt_logprobs=3))
        outputs = steps(runner, scheduler, preempt_after)
        assert [len(output.logprobs) for output in outputs] == [1] * 8
        got, *later = (output.prompt_logprobs for output in outputs)
        assert not any(later), "they come once, with the first token"
        assert [entry.logprob for entry in got] == pytest.approx(expected, abs=1e-5)
        assert all(len(entry.top_ids) == 3 and entry.top_logprobs[0] >= entry.logprob for entry in got)
    assert scheduler.stats.cached_tokens == 0
    scheduler.add("plain", PROMPT, SamplingParams(max_tokens=1))
    assert steps(runner, scheduler)[0].prompt_logprobs == []
    assert scheduler.stats.cached_tokens == 28
