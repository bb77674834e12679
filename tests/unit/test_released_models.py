"""The released models in conf/model: their sizes are the published ones, and each plans on a cluster of H200."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pytest

from tests.unit.test_config import choices, compose
from toolkit.config.engine import EngineConfig
from toolkit.config.resolve import resolve
from toolkit.engine.arch import Arch, read_arch
from toolkit.engine.dims import ParallelDims
from toolkit.engine.memory import memory_by_kind
from toolkit.launch.check import check
from toolkit.launch.check_model import memory
from toolkit.launch.plan import plan

DEP16 = ()
MODELS = {
    # name: (10^9 parameters, bytes of KV cache a token in bf16 while no window is full, overrides for 16 H200)
    "deepseek_v3": (671.0, 70_272, DEP16),
    "deepseek_v3_fp8": (671.0, 70_272, DEP16),
    "deepseek_r1": (671.0, 70_272, DEP16),
    "qwen3_30b_a3b": (30.5, 98_304, DEP16),
    "qwen3_235b_a22b": (235.1, 192_512, DEP16),
    "mixtral_8x7b": (46.7, 131_072, ("engine.ep_num_redundant_experts=8",)),
    "gemma3_1b": (1.0, 26 * 1024, ("parallel=tp4",)),
    "gemma3_4b": (3.88, 34 * 4096, ("parallel=tp8",)),
    "gemma3_27b": (27.0, 62 * 8192, ("parallel.ep_size=1",)),
}


def arch_of(name: str) -> Arch:
    return read_arch(compose(f"model={name}").model)


def test_every_released_model_is_here() -> None:
    assert set(choices("model")) - {"tiny", "smollm2_moe"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_published_ones(name: str) -> None:
    parameters, kv_bytes, _ = MODELS[name]
    arch = arch_of(name)
    engine = EngineConfig(page_size=16, max_total_tokens=16)
    memory = memory_by_kind(arch, ParallelDims(1, 1, 1, 1, None), engine, "bfloat16")
    kv_cache = memory.pop("kv_cache")
    assert sum(memory.values()) / 2e9 == pytest.approx(parameters, rel=0.003)
    assert kv_cache == 16 * kv_bytes


def test_fp8_halves_what_is_kept_in_it() -> None:
    """DeepSeek's release: matrices in FP8; embedding, head, norms, gates and the latent's expansion are not."""
    arch, engine = arch_of("deepseek_v3_fp8"), EngineConfig(page_size=16, max_total_tokens=16)
    one = ParallelDims(1, 1, 1, 1, None)
    kept = memory_by_kind(arch, one, engine, "bfloat16", "cuda")
    plain = memory_by_kind(arch_of("deepseek_v3"), one, engine, "bfloat16", "cuda")
    for kind in ("experts", "shared_experts", "dense_ffn"):
        assert kept[kind] == pytest.approx(plain[kind] / 2, rel=3e-4)
    assert kept["embedding"] == plain["embedding"] and kept["kv_cache"] == plain["kv_cache"]
    assert plain["attention"] / 2 < kept["attention"] < 0.6 * plain["attention"]
    cpu = memory_by_kind(arch, one, engine, "bfloat16", "cpu")
    assert {kind: cpu[kind] for kind in cpu if kind != "kv_cache"} == {k: plain[k] for k in plain if k != "kv_cache"}


@pytest.mark.parametrize("name", MODELS)
def test_it_plans_on_two_nodes(name: str) -> None:
    overrides = ("+exp=dep16", f"model={name}", *MODELS[name][2], "dry_run=true")
    cfg = resolve(compose(*overrides))
    assert check(cfg) == []
    assert plan(cfg, 25_000).num_gpus == cfg.parallel.tp_size
    assert sum(memory(cfg).values()) < 141e9


def test_a_dense_model_refuses_options_for_experts() -> None:
    cfg = resolve(compose("+exp=dep16", "model=gemma3_27b", "engine.ep_num_redundant_experts=16", "dry_run=true"))
    assert check(cfg) == [
        "parallel.ep_size=16 needs experts, but gemma3_text has none: use 1",
        "engine.ep_num_redundant_experts=16 needs experts, but gemma3_text has none: use 0",
    ]


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("deepseek_v3", "topk_method", "greedy", "topk_method='greedy' is not supported: .*'noaux_tc' only"),
        ("gemma3_1b", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0 is not supported"),
        ("qwen3_30b_a3b", "attention_bias", True, "attention_bias=True is not supported"),
        ("qwen3_30b_a3b", "quantization_config", {"quant_method": "awq"}, "quant_method=awq .* is not supported: use"),
    ],
)
def test_a_setting_that_is_not_computed_is_refused(name: str, key: str, value: object, message: str) -> None:
    model = compose(f"model={name}").model
    assert model.hf_config is not None
    with pytest.raises(ValueError, match=message):
        read_arch(dataclasses.replace(model, hf_config=model.hf_config | {key: value}))


@pytest.mark.parametrize(
    ("sparse_step", "dense", "moe_layers"),
    [(1, [], range(48)), (2, [], range(1, 48, 2)), (2, [1, 5], (3, *range(7, 48, 2)))],
)
def test_which_layers_of_qwen3_have_experts(sparse_step: int, dense: list[int], moe_layers: Sequence[int]) -> None:
    model = compose("model=qwen3_30b_a3b").model
    assert model.hf_config is not None
    hf_config = model.hf_config | {"decoder_sparse_step": sparse_step, "mlp_only_layers": dense}
    assert read_arch(dataclasses.replace(model, hf_config=hf_config)).moe_layers == tuple(moe_layers)


def test_a_multimodal_gemma_config_is_read_for_its_text() -> None:
    """As released, the 4B's text_config leaves out what is the default of its class."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    model = compose("model=gemma3_4b").model
    multimodal = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    found = read_arch(dataclasses.replace(model, hf_config=multimodal))
    assert dataclasses.replace(found, hf={}) == dataclasses.replace(arch_of("gemma3_4b"), hf={})


@pytest.mark.parametrize(
    ("name", "ratio", "message"),
    [
        ("gemma3_27b", 1.5, r"swa_full_tokens_ratio=1\.5 must be within 0 and 1: use 0"),
        (
            "gemma3_27b",
            0.001,
            r"swa_full_tokens_ratio=0\.001 leaves sliding layers 2 .* needs 17: use at least 0\.0083",
        ),
        ("qwen3_30b_a3b", 0.5, r"swa_full_tokens_ratio=0\.5 needs sliding layers, but qwen3_moe has none: use 0"),
    ],
)
def test_a_share_of_the_cache_that_cannot_work_is_refused(name: str, ratio: float, message: str) -> None:
    overrides = ("+exp=dep16", f"model={name}", "parallel=tp16", f"engine.swa_full_tokens_ratio={ratio}")
    backend = "engine.moe_a2a_backend=allgather"
    (error,) = check(resolve(compose(*overrides, backend, "dry_run=true")))
    assert re.search(message, error)
