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
from tests.dist.steps import texts
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.core import SamplingParams
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups
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


def errors(logits: dict[int, dict[int, np.ndarray]], case: Case) -> list[float]:
    """Of each sequence, the relative error of all its logits together."""
    assert logits
    found = []
    for i, by_position in sorted(logits.items()):
        rows = sorted(by_position)
        assert len(rows) >= 80 - PROMPT
        got, wanted = np.stack([by_position[r] for r in rows]), case.expected[i][rows]
        found.append(float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
    return found


@pytest.fixture(scope="module")
def bf16_error(case: Case) -> float:
    """What rounding to bf16 costs the CPU reference itself; a choice of experts that nearly ties may tip over."""
    return max(errors(served(case, "bfloat16", "cpu"), case))


def served(
    case: Case, dtype: str, device: str = DEVICE, runner: str = "auto", attention: str = "auto"
) -> dict[int, dict[int, np.ndarray]]:
    model = replace(case.model, dtype=dtype)
    options = engine(moe_runner_backend=runner, attention_backend=attention)
    with torch.inference_mode():
        return forced_logits(Groups.single(), model, options, case.sequences, PROMPT, device)


def test_logits_in_float32(case: Case) -> None:
    """No kernel but the fused ones: attention by sdpa, experts by torch."""
    assert max(errors(served(case, "float32", runner="torch", attention="sdpa"), case)) < 1e-4


@pytest.mark.parametrize("runner", ["auto", "grouped_mm"])
def test_logits_in_bfloat16(case: Case, bf16_error: float, runner: str) -> None:
    """Whatever attention ``auto`` chooses."""
    assert max(errors(served(case, "bfloat16", runner=runner), case)) < 2 * bf16_error + 0.01


def tokens(runner: ModelRunner, groups: Groups, ahead: bool, temperature: float) -> list[list[int]]:
    """What four requests of unequal length say; on every rank the same."""
    prompts = [list(range(3 + i, 40 + 7 * i)) for i in range(4)]
    params = [SamplingParams(max_tokens=24 - i, temperature=temperature, seed=i) for i in range(4)]
    return texts(runner, groups, prompts, params, ahead)[0]


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
            found[graphs, ahead, temperature] = tokens(runner, runner.groups, ahead, temperature)
    for temperature in (0.0, 0.8):
        texts = {key: text for key, text in found.items() if key[2] == temperature}
        assert [len(t) for t in next(iter(texts.values()))] == [24, 23, 22, 21]
        assert all(text == next(iter(texts.values())) for text in texts.values()), texts


def test_logits_with_an_fp8_cache(case: Case, bf16_error: float) -> None:
    """Queries and latents lose 2^-4 each; scores and sums average that out."""
    if not read_arch(case.model).mla:
        pytest.skip("for latent attention")
    model, options = replace(case.model, dtype="bfloat16"), engine(kv_cache_dtype="fp8_e4m3")
    with torch.inference_mode():
        found = forced_logits(Groups.single(), model, options, case.sequences, PROMPT, DEVICE)
    assert bf16_error < max(errors(found, case)) < 2 * bf16_error + 0.1


def test_the_kv_cache_takes_what_is_left(case: Case) -> None:
    model = ModelConfig(path=case.model.path, dtype="bfloat16")
    options = engine(mem_fraction_static=0.2, max_total_tokens=256)
    runner = ModelRunner(model, read_arch(model), options, Groups.single(), DEVICE)
    used = prepare(runner, lambda stage, done, total: None)
    total = torch.cuda.get_device_properties(0).total_memory
    assert used["graphs"] > 0 and sum(used.values()) < 0.21 * total, used
    if all(runner.arch.windows):
        assert runner.engine.max_total_tokens == 8 * 256  # what all running requests could use
    else:
        assert sum(used.values()) > 0.15 * total, used


DEP2 = ParallelDims.of(ParallelConfig(2, 2, 2, enable_dp_attention=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dispatcher", ["allgather", "all_to_all"])
def test_two_gpus(case: Case, bf16_error: float, dispatcher: str) -> None:
    if not read_arch(case.model).moe_layers:
        dims = ParallelDims.of(ParallelConfig(2, 2, 1, enable_dp_attention=True))
    else:
        dims = DEP2
    model = replace(case.model, dtype="bfloat16")
    for logits in run_ranks(
        dims, forced_logits, model, engine(moe_a2a_backend=dispatcher), case.sequences, PROMPT, None, device="cuda"
    ):
        assert max(errors(logits, case)) < 2 * bf16_error + 0.01


def both_ways(groups: Groups, model: ModelConfig, changes: dict[str, object]) -> dict[bool, list[list[int]]]:
    """Texts of this rank with and without graphs."""
    found = {}
    for graphs in (False, True):
        options = engine(disable_cuda_graph=not graphs, chunked_prefill_size=512, **changes)
        runner = ModelRunner(model, read_arch(model), options, groups, f"cuda:{groups.rank}")
        prepare(runner, lambda stage, done, total: None)
        if graphs:
            runner.capture((1, 2, 3, 4))
        assert (runner.graphs is not None) == graphs
        found[graphs] = tokens(runner, groups, ahead=True, temperature=0.0)
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dispatcher", ["all_to_all", "deepep", "nvlink"])
@pytest.mark.parametrize("overlap", [False, True])
def test_graphs_of_two_gpus(case: Case, dispatcher: str, overlap: bool) -> None:
    """With two-batch overlap a graph holds both halves."""
    arch = read_arch(case.model)
    if arch.family not in ("qwen3_moe", "deepseek_v3") or (overlap and dispatcher == "nvlink"):
        pytest.skip("not of this model or dispatcher")
    if dispatcher != "all_to_all":
        pytest.importorskip("deep_ep")
    changes = {"moe_a2a_backend": dispatcher, "enable_two_batch_overlap": overlap, "moe_runner_backend": "auto"}
    for found in run_ranks(DEP2, both_ways, replace(case.model, dtype="bfloat16"), changes, device="cuda"):
        assert [len(t) for t in found[True]] == [24, 23, 22, 21]
        assert found[True] == found[False]
