"""Every legal mapping gives transformers' logits. One set of processes a world size goes through all of its mappings."""

from __future__ import annotations

import pytest

from tests.dist.cases import Case
from tests.dist.every_mapping import LENGTH, SEQUENCES, all_mappings
from tests.dist.families import make_case
from tests.dist.ranks import run_ranks
from toolkit.engine.dims import ParallelDims


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3", "gemma3_text"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param), LENGTH, SEQUENCES)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_mapping_equals_the_oracle(case: Case, world: int) -> None:
    for rank, failures in enumerate(run_ranks(ParallelDims(world, 1, 1, 1, None), all_mappings, case)):
        assert not failures, f"rank {rank}: {failures[0]} (and {len(failures) - 1} more)"
