"""The engine on GPUs: logits of small models against transformers on the CPU; graphs and run-ahead change none.

Experts and tokens are forced where two ways on a GPU are compared: a random model's text cascades from one near tie.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.dist.cases import Case
from tests.dist.forced import forced_logits
from tests.dist.ranks import run_ranks
from tests.dist.steps import texts
from tests.gpu.forced_routes import ForcedSampler, force, furthest
from tests.gpu.needs import SIZES, needs_gpus
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


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """To whoever else is on this GPU: what torch keeps of a runner that is gone would be missing there."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


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


PROMPTS = [list(range(3 + i, 40 + 7 * i)) for i in range(4)]
LENGTHS = [24, 23, 22, 21]
ROUNDING = 0.04  # largest relative error of a position's logits, experts and tokens forced


def tokens(runner: ModelRunner, groups: Groups, ahead: bool, temperature: float = 0.0) -> list[list[int]]:
    """What four requests of unequal length say; the same requests on every rank."""
    params = [SamplingParams(max_tokens=n, temperature=temperature, seed=i) for i, n in enumerate(LENGTHS)]
    return texts(runner, groups, PROMPTS, params, ahead)[0]


def ready(model: ModelConfig, options: EngineConfig, groups: Groups, device: str) -> tuple[ModelRunner, ForcedSampler]:
    """A runner that takes given experts and tokens, with graphs of exactly the batches that occur."""
    runner = ModelRunner(model, read_arch(model), options, groups, device)
    sampler = force(runner)
    prepare(runner, lambda stage, done, total: None)
    if not options.disable_cuda_graph:
        runner.capture((1, 2, 3, 4))
        assert runner.graphs is not None and runner.graphs.sizes == (1, 2, 3, 4)
    sampler.take()
    return runner, sampler


def both_ways(groups: Groups, model: ModelConfig, changes: dict[str, object]) -> list[float]:
    """How far logits are from those of launched steps: launched steps again, graphs, each waited for and run ahead."""
    found, wanted, forced = [], None, {}
    for graphs, ahead in product((False, True), (False, True)):
        options = engine(**{"disable_cuda_graph": not graphs, "chunked_prefill_size": 512} | changes)
        if not ahead:
            runner, sampler = None, None  # before the next one: both would hold their memory
            gc.collect()
            runner, sampler = ready(model, options, groups, f"cuda:{groups.rank}")
        assert runner is not None and sampler is not None
        sampler.forced = forced
        said = tokens(runner, groups, ahead)
        assert [len(text) for text in said] == LENGTHS
        logits = sampler.take()
        if wanted is None:
            wanted, forced = logits, {str(i): text for i, text in enumerate(said)}
        found.append(furthest(logits, wanted))
    return found


def test_graphs_and_running_ahead_change_no_logits(case: Case) -> None:
    with torch.inference_mode():
        found = both_ways(Groups.single(), replace(case.model, dtype="bfloat16"), {})
    assert max(found) < ROUNDING, found


@pytest.mark.parametrize("graphs", [False, True])
def test_running_ahead_changes_no_sampled_token(case: Case, graphs: bool) -> None:
    model, options = replace(case.model, dtype="bfloat16"), engine(disable_cuda_graph=not graphs)
    runner = ModelRunner(model, read_arch(model), options, Groups.single(), DEVICE)
    prepare(runner, lambda stage, done, total: None)
    one_by_one, ahead = (tokens(runner, runner.groups, ahead, temperature=0.8) for ahead in (False, True))
    assert [len(text) for text in ahead] == LENGTHS and ahead == one_by_one


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
    free, total = torch.cuda.mem_get_info()
    others = 1 - free / total  # what other programs on this GPU take counts as taken
    options = engine(mem_fraction_static=others + 0.2, max_total_tokens=256)
    runner = ModelRunner(model, read_arch(model), options, Groups.single(), DEVICE)
    used = prepare(runner, lambda stage, done, total: None)
    share = sum(used.values()) / total - others
    assert used["graphs"] > 0 and share < 0.21, used
    if all(runner.arch.windows):
        assert runner.engine.max_total_tokens == 8 * 256  # what all running requests could use
    else:
        assert share > 0.15, used


def dims(case: Case, ranks: int) -> ParallelDims:
    ep = ranks if read_arch(case.model).moe_layers else 1
    return ParallelDims.of(ParallelConfig(ranks, ranks, ep, enable_dp_attention=True))


@pytest.mark.parametrize("dispatcher", ["allgather", "all_to_all", "nvlink"])
@pytest.mark.parametrize("ranks", SIZES[1:])
def test_logits_of_several_gpus(case: Case, bf16_error: float, dispatcher: str, ranks: int) -> None:
    if dispatcher != "allgather" and not read_arch(case.model).moe_layers:
        pytest.skip("no experts")
    model, options = replace(case.model, dtype="bfloat16"), engine(moe_a2a_backend=dispatcher)
    for logits in run_ranks(
        dims(case, ranks), forced_logits, model, options, case.sequences, PROMPT, None, device="cuda"
    ):
        assert max(errors(logits, case)) < 2 * bf16_error + 0.01


OVERLAP = {"enable_two_batch_overlap": True}
GRAPHS: list[tuple[int, str, dict[str, object]]] = [
    (2, "all_to_all", {}), (2, "all_to_all", OVERLAP), (2, "deepep", {}), (2, "deepep", OVERLAP), (2, "nvlink", {}),
    (4, "deepep", {}), (4, "nvlink", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "dispatcher", "more"),
    [
        pytest.param(*kind, marks=needs_gpus(kind[0]), id=f"{kind[0]}-{kind[1]}{'-halves' * bool(kind[2])}")
        for kind in GRAPHS
    ],
)
def test_graphs_of_several_gpus(case: Case, ranks: int, dispatcher: str, more: dict[str, object]) -> None:
    """With two-batch overlap a graph holds both halves."""
    if read_arch(case.model).family not in ("qwen3_moe", "deepseek_v3"):
        pytest.skip("not of this model")
    if dispatcher == "deepep":
        pytest.importorskip("deep_ep")
    changes = {"moe_a2a_backend": dispatcher, "moe_runner_backend": "auto"} | more
    for found in run_ranks(dims(case, ranks), both_ways, replace(case.model, dtype="bfloat16"), changes, device="cuda"):
        assert max(found) < ROUNDING, found
