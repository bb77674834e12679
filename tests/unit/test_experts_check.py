"""What DeepEP cannot do is refused before anything starts, with field, value, rule and way out."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import Arch, read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.dims import ParallelDims
from toolkit.engine.experts_check import whole_tiles

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def errors(ranks: int = 4, changed: dict[str, Any] | None = None, **engine: Any) -> list[str]:
    dims = ParallelDims.of(ParallelConfig(ranks, ranks, ranks, enable_dp_attention=ranks > 1))
    return check(arch(changed), dims, EngineConfig(**{"moe_a2a_backend": "deepep", **engine}))


def arch(changed: dict[str, Any] | None = None) -> Arch:
    return read_arch(ModelConfig(hf_config={**QWEN, **(changed or {})}, load_format="dummy"))


@pytest.mark.parametrize("engine", [
    {}, {"deepep_buffer": "legacy"}, {"deepep_mode": "normal"}, {"deepep_mode": "low_latency"},
    {"deepep_dispatch_dtype": "bf16"}, {"deepep_num_max_dispatch_tokens_per_rank": 32},
    {"deepep_mode": "low_latency", "deepep_num_max_dispatch_tokens_per_rank": 512},
])  # fmt: skip
def test_what_it_can_do_passes(engine: dict[str, Any]) -> None:
    assert errors(**engine) == []


@pytest.mark.parametrize(("ranks", "changed", "engine", "message"), [
    (1, {}, {}, r"deepep sends rows between EP ranks, but parallel.ep_size=1: .*allgather"),
    (4, {"hidden_size": 2052}, {}, r"multiple of 8 values, but hidden_size=2052: use moe_a2a_backend=all_to_all"),
    (4, {"hidden_size": 2112, **FP8}, {}, r"multiple of 128 values, but hidden_size=2112"),
    (4, {"num_experts_per_tok": 40}, {}, r"up to 32 experts a token, the model has 40"),
    (4, {}, {"deepep_dispatch_dtype": "fp8"}, r"deepep_dispatch_dtype=fp8 needs experts in FP8 .*use auto or bf16"),
    (4, {}, {"deepep_num_max_dispatch_tokens_per_rank": -1}, r"per_rank=-1 must not be negative"),
    (4, {}, {"deepep_mode": "low_latency", "deepep_num_max_dispatch_tokens_per_rank": 100},
     r"per_rank=100 has less room than the 512 rows .*raise it to 512, or use deepep_mode=auto"),
    (4, {"hidden_size": 1024}, {"deepep_buffer": "legacy"}, r"low-latency kernels for .*not for 1024: .*v2"),
    (4, {"num_experts_per_tok": 12}, {"deepep_buffer": "legacy"}, r"up to 11 experts a token with low latency"),
    (4, {}, {"deepep_buffer": "legacy", "max_running_requests": 512, "chunked_prefill_size": 1024},
     r"room for 480 rows a rank with low latency, but a step may bring 512: .*per_rank <= 480"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    ranks: int, changed: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    found = errors(ranks, changed, **engine)
    assert len(found) == 1, found
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[0])


@pytest.mark.parametrize(
    ("rows", "ranks", "room"),
    [(8, 2, 64), (64, 2, 64), (65, 2, 128), (8, 4, 32), (3, 24, 16), (1, 128, 1), (5, 256, 5)],
)
def test_rows_of_all_ranks_fill_whole_tiles(rows: int, ranks: int, room: int) -> None:
    """A GEMM over slots stores whole tiles: one that began in a slot would end in the next."""
    assert whole_tiles(rows, ranks) == room and room * ranks % 128 == 0


def test_legacy_runs_over_some_numbers_of_ranks() -> None:
    dims = ParallelDims.of(ParallelConfig(6, 6, 6, enable_dp_attention=True))
    odd = arch({"num_experts": 126, "vocab_size": 504})
    options = EngineConfig(moe_a2a_backend="deepep", deepep_buffer="legacy")
    [found] = [e for e in check(odd, dims, options) if "deepep" in e]
    assert found.startswith("engine.deepep_buffer=legacy runs over 2, 4, 8,") and "parallel.ep_size=6: use" in found


def test_options_of_deepep_need_deepep() -> None:
    [found] = errors(moe_a2a_backend="allgather", deepep_mode="normal")
    assert found.startswith(
        "engine.deepep_mode=normal is an option of engine.moe_a2a_backend=deepep and nvlink, but that is allgather"
    )
