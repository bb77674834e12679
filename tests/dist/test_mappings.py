"""Every legal mapping gives transformers' logits. One set of processes a world size goes through all of its mappings.

On eight ranks one family goes through all pairs of attention's and experts' degrees: what lies between the two is no
family's own. The others go through each degree there, and through all pairs on fewer ranks.
"""

from __future__ import annotations

import pytest

from tests.dist.cases import Case
from tests.dist.every_mapping import LENGTH, SEQUENCES, all_mappings
from tests.dist.families import make_case
from tests.dist.ranks import run_ranks
from toolkit.engine.arch import read_arch
from toolkit.engine.dims import ParallelDims


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3", "gemma3_text"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param), LENGTH, SEQUENCES)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_mapping_equals_the_oracle(case: Case, world: int) -> None:
    pairs = world < 8 or read_arch(case.model).family == "deepseek_v3"
    for rank, failures in enumerate(run_ranks(ParallelDims(world, 1, 1, 1, None), all_mappings, case, pairs)):
        assert not failures, f"rank {rank}: {failures[0]} (and {len(failures) - 1} more)"
