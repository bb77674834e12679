"""Logits of both families against transformers: prefill, chunks, decode, one rank and several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist.forced import forced_logits
from tests.dist.ranks import run_ranks
from toolkit.config import EngineConfig, ModelConfig, ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, PROMPT = 96, 22, 15


def mixtral() -> torch.nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def deepseek_v3() -> torch.nn.Module:
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=128,
        rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "beta_fast": 32,
                      "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


FAMILIES = {"mixtral": mixtral, "deepseek_v3": deepseek_v3}


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(model config, token sequences, transformers' logits) of one family with random weights."""
    torch.manual_seed(0)
    oracle = FAMILIES[request.param]().float().eval()
    for name, parameter in oracle.named_parameters():
        with torch.no_grad():  # large enough that every part of the model matters
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.2)
    for name, buffer in oracle.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(folder)
    sequences = [torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(5)]
    sequences[3] = sequences[1][:8] + sequences[3][8:]  # a shared prefix
    with torch.no_grad():
        expected = oracle(torch.tensor(sequences)).logits[:, :-1].numpy()
    return ModelConfig(path=str(folder), dtype="float32"), sequences, expected


def engine(**changes: object) -> EngineConfig:
    values = {"page_size": 4, "max_total_tokens": 256, "max_running_requests": 8, "chunked_prefill_size": 64}
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


def close(found: dict[int, np.ndarray], expected: np.ndarray) -> None:
    """Every position that was computed equals the oracle's; decode computes all of its own."""
    assert set(found) >= set(range(PROMPT - 1, LENGTH - 1))
    for position, row in found.items():
        np.testing.assert_allclose(row, expected[position], rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("budget", [64, 8])
def test_one_rank_prefill_chunks_and_decode(case, budget: int) -> None:
    model, sequences, expected = case
    with torch.inference_mode():
        logits = forced_logits(
            Groups.single(), model, engine(chunked_prefill_size=budget, moe_a2a_backend="allgather"), sequences, PROMPT
        )
    assert sorted(logits) == list(range(len(sequences)))
    for i, found in logits.items():
        close(found, expected[i])


MAPPINGS = {
    "dep2": (ParallelConfig(2, 2, 2, enable_dp_attention=True), "all_to_all"),
    "dep4": (ParallelConfig(4, 4, 4, moe_dense_tp_size=1, enable_dp_attention=True), "all_to_all"),
    "dep4-dp-lm-head": (ParallelConfig(4, 4, 4, enable_dp_attention=True, enable_dp_lm_head=True), "all_to_all"),
    "attention-tp2-dp2-dp-lm-head": (
        ParallelConfig(4, 2, 4, enable_dp_attention=True, enable_dp_lm_head=True), "all_to_all"),
    "dep4-allgather": (ParallelConfig(4, 4, 4, enable_dp_attention=True), "allgather"),
    "tep2": (ParallelConfig(2, 1, 2), "all_to_all"),
    "tep2-allgather": (ParallelConfig(2, 1, 2), "allgather"),
    "tp4": (ParallelConfig(4, 1, 1), "allgather"),
    "attention-tp2-dp2-ep4": (ParallelConfig(4, 2, 4, enable_dp_attention=True), "all_to_all"),
    "ep2-moetp2": (ParallelConfig(4, 4, 2, enable_dp_attention=True), "allgather"),
    "ep2-moedp2": (ParallelConfig(4, 2, 2, 2, enable_dp_attention=True), "all_to_all"),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_equal_the_oracle(case, name: str) -> None:
    model, sequences, expected = case
    parallel, backend = MAPPINGS[name]
    dims = ParallelDims.of(parallel)
    options = engine(moe_a2a_backend=backend, chunked_prefill_size=16)
    found = run_ranks(dims, forced_logits, model, options, sequences, PROMPT)
    for rank, logits in enumerate(found):
        assert sorted(logits) == [i for i in range(len(sequences)) if i % dims.dp_size == dims.dp_rank(rank)]
        for i, rows in logits.items():
            close(rows, expected[i])


@pytest.mark.parametrize("padding", ["max_len", "sum_len"])
def test_both_padding_rules(case, padding: str) -> None:
    """Three DP ranks' worth of uneven work on four ranks, gathered for dense and expert layers alike."""
    model, sequences, expected = case
    dims = ParallelDims.of(ParallelConfig(4, 4, 4, enable_dp_attention=True))
    options = engine(moe_a2a_backend="allgather", dp_padding_mode=padding, chunked_prefill_size=8)
    for logits in run_ranks(dims, forced_logits, model, options, sequences[:3], PROMPT):
        for i, rows in logits.items():
            close(rows, expected[i])


def test_redundant_experts_change_nothing(case) -> None:
    model, sequences, expected = case
    parallel = ParallelConfig(2, 2, 2, enable_dp_attention=True)
    options = engine(ep_num_redundant_experts=6)
    for logits in run_ranks(ParallelDims.of(parallel), forced_logits, model, options, sequences, PROMPT):
        for i, rows in logits.items():
            close(rows, expected[i])


def test_preemption_recomputes_to_the_same_logits(case) -> None:
    """Eight blocks too few for three requests: some give way and come back."""
    model, sequences, expected = case
    with torch.inference_mode():
        logits = forced_logits(Groups.single(), model, engine(max_total_tokens=64), sequences, PROMPT)
    for i, found in logits.items():
        close(found, expected[i])


def test_a_missing_tensor_is_named(case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, sequences, _ = case
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
