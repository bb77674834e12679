"""The engine on GPUs: logits of small models against transformers on the CPU; graphs and run-ahead change no token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.dist.cases import Case
from tests.dist.forced import forced_logits
from tests.dist.ranks import run_ranks
from toolkit.config import EngineConfig, ModelConfig, ParallelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.core import SamplingParams, StepContext
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.prepare import prepare
from toolkit.engine.runner import ModelRunner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PROMPT, DEVICE = 70, "cuda:0"


def engine(**changes: object) -> EngineConfig:
    values = {
        "page_size": 64, "max_total_tokens": 4096, "max_running_requests": 8, "chunked_prefill_size": 200,
        "moe_a2a_backend": "allgather", "moe_runner_backend": "grouped_mm", "context_length": 256,
    }  # fmt: skip
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral-sliding", "deepseek_v3", "gemma3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from tests.gpu.families import make_case

    return make_case(request.param, tmp_path_factory.mktemp(request.param))


def check(logits: dict[int, dict[int, np.ndarray]], case: Case, most: float) -> None:
    """Relative error of all logits together; and what is most likely, where that is not nearly a tie."""
    assert logits
    for i, found in logits.items():
        rows = sorted(found)
        assert len(rows) >= 80 - PROMPT
        got, wanted = np.stack([found[r] for r in rows]), case.expected[i][rows]
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert error < most, f"sequence {i}: relative error {error:.2e}"


def served(case: Case, dtype: str, **changes: object) -> dict[int, dict[int, np.ndarray]]:
    model = replace(case.model, dtype=dtype)
    with torch.inference_mode():
        return forced_logits(Groups.single(), model, engine(**changes), case.sequences, PROMPT, DEVICE)


def test_logits_in_float32(case: Case) -> None:
    """No kernel but the fused ones: attention by sdpa, experts by torch."""
    check(served(case, "float32", attention_backend="sdpa", moe_runner_backend="torch"), case, 1e-4)


@pytest.mark.parametrize("runner", ["auto", "grouped_mm"])
def test_logits_in_bfloat16(case: Case, runner: str) -> None:
    """Whatever ``auto`` chooses."""
    check(served(case, "bfloat16", moe_runner_backend=runner), case, 6e-2)


def tokens(runner: ModelRunner, ahead: bool, temperature: float) -> list[list[int]]:
    """What four requests of unequal length say."""
    scheduler = runner.new_scheduler()
    texts: dict[str, list[int]] = {}
    for i in range(4):
        params = SamplingParams(max_tokens=24 - i, temperature=temperature, seed=i)
        assert scheduler.add(str(i), list(range(3 + i, 40 + 7 * i)), params) is None
    steps: list[int] = []

    def over(step: Step) -> None:
        steps.append(step.number)
        for output in step.outputs:
            texts.setdefault(output.rid, []).extend(output.token_ids)

    pipeline = Pipeline(runner, scheduler, ahead, over)
    for number in range(100):
        pipeline.before_schedule()
        batch = scheduler.schedule()
        if not batch.num_tokens:
            pipeline.drain()
            if scheduler.idle:
                break
            continue
        pipeline.launch(
            batch, StepContext(number, (batch.num_tokens,), (batch.num_logit_rows,), is_extend=bool(batch.prefill))
        )
    assert steps == sorted(steps) and len(texts) == 4
    return [texts[str(i)] for i in range(4)]


def test_graphs_and_running_ahead_change_no_token(case: Case) -> None:
    model = ModelConfig(path=case.model.path, dtype="bfloat16")
    found = {}
    for graphs in (False, True):
        # sizes of exactly the batches that occur, so that both multiply matrices of equal shape
        runner = ModelRunner(model, read_arch(model), engine(disable_cuda_graph=not graphs), Groups.single(), DEVICE)
        prepare(runner, lambda stage, done, total: None)
        if graphs:
            runner.capture((1, 2, 3, 4))
            assert runner.graphs is not None and runner.graphs.sizes == (1, 2, 3, 4)
        for ahead, temperature in product((False, True), (0.0, 0.8)):
            found[graphs, ahead, temperature] = tokens(runner, ahead, temperature)
    for temperature in (0.0, 0.8):
        texts = {key: text for key, text in found.items() if key[2] == temperature}
        assert [len(t) for t in next(iter(texts.values()))] == [24, 23, 22, 21]
        assert all(text == next(iter(texts.values())) for text in texts.values()), texts


def test_the_kv_cache_takes_what_is_left(case: Case) -> None:
    model = ModelConfig(path=case.model.path, dtype="bfloat16")
    options = engine(mem_fraction_static=0.2, max_total_tokens=256)
    runner = ModelRunner(model, read_arch(model), options, Groups.single(), DEVICE)
    used = prepare(runner, lambda stage, done, total: None)
    total = torch.cuda.get_device_properties(0).total_memory
    assert runner.engine.max_total_tokens > 10_000
    assert 0.15 * total < sum(used.values()) < 0.21 * total, used
    assert used["graphs"] > 0


DEP2 = ParallelDims.of(ParallelConfig(2, 2, 2, enable_dp_attention=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dispatcher", ["allgather", "all_to_all"])
def test_two_gpus(case: Case, dispatcher: str) -> None:
    if not read_arch(case.model).moe_layers:
        dims = ParallelDims.of(ParallelConfig(2, 2, 1, enable_dp_attention=True))
    else:
        dims = DEP2
    model = replace(case.model, dtype="bfloat16")
    for logits in run_ranks(
        dims, forced_logits, model, engine(moe_a2a_backend=dispatcher), case.sequences, PROMPT, None, device="cuda"
    ):
        check(logits, case, 6e-2)
