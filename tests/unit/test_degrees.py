"""Every combination of degrees, legal and illegal: the relations written down once more, and what a refusal says."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import pytest

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import Arch, read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.dims import ParallelDims

DEGREES = (-1, 0, 1, 2, 3, 4, 8, 16)
SENTENCE = re.compile(
    r"^(?P<group>parallel|engine)\.(?P<field>\w+)(?: / parallel\.\w+)*=(?P<value>\S+) .+: .*(use|raise) \S+"
)


def combinations(world: int) -> Iterator[ParallelConfig]:
    for dp, ep, moe_dp, dense, attention, head in itertools.product(
        DEGREES, DEGREES, DEGREES, (None, 0, 1, 2), (False, True), (False, True)
    ):
        yield ParallelConfig(world, dp, ep, moe_dp, dense, enable_dp_attention=attention, enable_dp_lm_head=head)


def is_legal(p: ParallelConfig) -> bool:
    """tp = attn_tp * dp = moe_tp * ep * moe_dp in whole numbers; dense TP is all or 1; DP attention where needed."""
    if min(p.tp_size, p.dp_size, p.ep_size, p.moe_dp_size) < 1:
        return False
    attention = p.tp_size % p.dp_size == 0 and (p.dp_size == 1 or p.enable_dp_attention)
    attention = attention and (p.enable_dp_attention or not p.enable_dp_lm_head)
    return attention and p.tp_size % (p.ep_size * p.moe_dp_size) == 0 and p.moe_dense_tp_size in (None, 1)


@pytest.mark.parametrize("world", [-1, 0, 1, 2, 3, 4, 8])
def test_degrees_are_legal_or_refused_with_a_way_out(world: int) -> None:
    legal = 0
    for parallel in combinations(world):
        if is_legal(parallel):
            dims = ParallelDims.of(parallel)
            assert dims.attn_tp * dims.dp_size == dims.moe_tp * dims.ep_size * dims.moe_dp_size == world
            legal += 1
            continue
        with pytest.raises(ValueError) as refused:
            ParallelDims.of(parallel)
        said = SENTENCE.match(str(refused.value))
        assert said, refused.value
        field = said["field"]
        assert said["value"].lower() == str(getattr(parallel, field)).lower()
        for value in ways_out(str(refused.value)):
            changed = dataclasses.replace(parallel, **{field: value})
            try:
                ParallelDims.of(changed)
            except ValueError as another:
                assert f".{field}=" not in str(another) or field in ("tp_size", "dp_size"), another
    assert (legal > 0) == (world >= 1)


def ways_out(message: str) -> list[int]:
    """The values that a refusal proposes for its field."""
    listed = re.search(r"use one of ([\d, ]+)$", message)
    return [int(value) for value in listed[1].split(", ")] if listed else []


# shapes that few degrees divide: 6 heads, 2 KV heads, 10 experts of 20 columns, a dense layer of 36, 90 rows
AWKWARD = {
    "model_type": "qwen3_moe", "vocab_size": 90, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 4, "num_experts": 10, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "intermediate_size": 36, "mlp_only_layers": [0], "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip


def fits(arch: Arch, dims: ParallelDims, engine: EngineConfig) -> bool:
    return (
        (10 + engine.ep_num_redundant_experts) % dims.ep_size == 0
        and 6 % dims.attn_tp == 0
        and 90 % dims.head_tp == 0
        and (2 % dims.attn_tp == 0 or dims.attn_tp % 2 == 0)
        and 20 % dims.moe_tp == 0
        and 36 % dims.dense_tp == 0
        and (engine.moe_a2a_backend == "allgather" or dims.moe_tp == 1)
    )


def test_degrees_fit_the_shapes_or_are_refused_with_a_way_out() -> None:
    arch = read_arch(ModelConfig(hf_config=AWKWARD, load_format="dummy"))
    counts = {True: 0, False: 0}
    for world in (1, 2, 3, 4, 6, 8):
        for parallel in filter(is_legal, combinations(world)):
            dims = ParallelDims.of(parallel)
            for backend, redundant in itertools.product(("allgather", "all_to_all"), (0, 2, 6)):
                engine = EngineConfig(moe_a2a_backend=backend, ep_num_redundant_experts=redundant, max_total_tokens=64)
                errors = check(arch, dims, engine)
                assert (errors == []) == fits(arch, dims, engine), (parallel, backend, errors)
                assert all(SENTENCE.match(error) for error in errors), errors
                counts[not errors] += 1
    assert min(counts.values()) > 50, counts
