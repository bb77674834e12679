"""Logits of every family against transformers: prefill, chunks, decode, prefix reuse, preemption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist.cases import PROMPT, Case, check_close, engine
from tests.dist.families import FAMILIES, make_case
from tests.dist.forced import forced_logits
from tests.dist.ranks import run_ranks
from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("budget", [64, 8])
def test_one_rank_prefill_chunks_and_decode(case: Case, budget: int) -> None:
    model, sequences, expected = case.model, case.sequences, case.expected
    with torch.inference_mode():
        logits = forced_logits(
            Groups.single(), model, engine(chunked_prefill_size=budget, moe_a2a_backend="allgather"), sequences, PROMPT
        )
    assert sorted(logits) == list(range(len(sequences)))
    for i, found in logits.items():
        check_close(found, expected[i])


@pytest.mark.parametrize("padding", ["max_len", "sum_len"])
def test_both_padding_rules(case: Case, padding: str) -> None:
    """Three DP ranks' worth of uneven work on four ranks, gathered for dense and expert layers alike."""
    dims = ParallelDims.of(ParallelConfig(4, 4, 4, enable_dp_attention=True))
    options = engine(moe_a2a_backend="allgather", dp_padding_mode=padding, chunked_prefill_size=8)
    for logits in run_ranks(dims, forced_logits, case.model, options, case.sequences[:3], PROMPT):
        for i, rows in logits.items():
            check_close(rows, case.expected[i])


OVERLAPPING = {
    "dep2": ParallelConfig(2, 2, 2, enable_dp_attention=True),
    "dep4": ParallelConfig(4, 4, 4, enable_dp_attention=True, moe_dense_tp_size=1),
    "attention-tp2-dp2": ParallelConfig(4, 2, 4, enable_dp_attention=True),
}


@pytest.mark.parametrize("mapping", OVERLAPPING)
def test_two_batch_overlap_changes_nothing(case: Case, mapping: str) -> None:
    """Halves of decode and of prefill, requests cut in two, halves without tokens, ranks without requests."""
    if not read_arch(case.model).moe_layers:
        pytest.skip("no experts, which the check refuses")
    options = engine(enable_two_batch_overlap=True, chunked_prefill_size=12)
    loads = [case.sequences[:count] for count in (5, 3, 1)]  # all ranks are busy, some idle, one alone
    for rank in run_ranks(ParallelDims.of(OVERLAPPING[mapping]), forced_logits_of_each, case.model, options, loads):
        for logits in rank:
            for i, rows in logits.items():
                check_close(rows, case.expected[i])


def forced_logits_of_each(
    groups: Groups, model: ModelConfig, options: EngineConfig, loads: list[list[list[int]]]
) -> list[dict[int, dict[int, np.ndarray]]]:
    """One load after the other, in the same processes."""
    return [forced_logits(groups, model, options, sequences, PROMPT) for sequences in loads]


def test_redundant_experts_change_nothing(case: Case) -> None:
    model, sequences, expected = case.model, case.sequences, case.expected
    if not read_arch(model).moe_layers:
        pytest.skip("no experts")
    parallel = ParallelConfig(2, 2, 2, enable_dp_attention=True)
    options = engine(ep_num_redundant_experts=6)
    for logits in run_ranks(ParallelDims.of(parallel), forced_logits, model, options, sequences, PROMPT):
        for i, rows in logits.items():
            check_close(rows, expected[i])


def test_preemption_recomputes_to_the_same_logits(case: Case) -> None:
    """Eight blocks too few for three requests: some give way and come back."""
    model, sequences, expected = case.model, case.sequences, case.expected
    with torch.inference_mode():
        logits = forced_logits(Groups.single(), model, engine(max_total_tokens=64), sequences, PROMPT)
    for i, found in logits.items():
        check_close(found, expected[i])


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral-sliding"])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_long_generations_over_many_windows(tmp_path: Path, family: str, ratio: float) -> None:
    """Ten windows of tokens; with a tenth of the blocks for sliding layers, requests give way to each other."""
    case = make_case(family, tmp_path, length=62)
    options = engine(swa_full_tokens_ratio=ratio, chunked_prefill_size=16)
    assert check(read_arch(case.model), ParallelDims(1, 1, 1, 1, None), options) == []
    with torch.inference_mode():
        logits = forced_logits(Groups.single(), case.model, options, case.sequences, PROMPT)
    for i, found in logits.items():
        check_close(found, case.expected[i])


def test_a_missing_tensor_is_named(case: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, sequences = case.model, case.sequences
    for file in Path(model.path).glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    tensors = load_file(Path(model.path) / "model.safetensors")
    name = next(n for n in tensors if "layers.1.self_attn.o_proj" in n)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in FAMILIES
    broken = ModelConfig(path=str(tmp_path), dtype="float32")
    with pytest.raises(ValueError, match=f"lacks the tensor {name}"):
        forced_logits(Groups.single(), broken, engine(), sequences, PROMPT)
