"""Every legal mapping gives transformers' logits. One set of processes a world size goes through all of its mappings."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.families import Case, check_close, engine, make_case
from tests.dist.forced import forced_logits
from tests.dist.ranks import run_ranks
from toolkit.config import ParallelConfig
from toolkit.engine.arch import Arch, check, read_arch
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Comm, Groups

SEQUENCES, PROMPT, LENGTH = 3, 7, 10


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def mappings(world: int, arch: Arch) -> Iterator[tuple[ParallelConfig, str]]:
    """Every (degrees, dispatcher) that the relations of SGLang allow; what a model cannot tell apart, once."""
    experts = [(1, 1)]
    if arch.moe_layers:
        experts = [(moe_dp, ep) for moe_dp in divisors(world) for ep in divisors(world // moe_dp)]
    dense = (None, 1) if len(arch.moe_layers) < arch.num_layers else (None,)
    for dp, (moe_dp, ep), dense_tp in itertools.product(divisors(world), experts, dense):
        parallel = ParallelConfig(world, dp, ep, moe_dp, dense_tp, enable_dp_attention=dp > 1)
        yield parallel, "allgather"
        if arch.moe_layers and ep == world // moe_dp:
            yield parallel, "all_to_all"


def all_mappings(groups: Groups, case: Case) -> list[str]:
    """Runs every mapping on ranks that are connected already -> what went wrong on this rank."""
    failures = []
    world, rank = groups.dims.tp_size, groups.rank
    split = functools.cache(lambda size, backend: Comm.split(world, rank, size, backend))
    arch = read_arch(case.model)
    for parallel, backend in mappings(world, arch):
        dims = ParallelDims.of(parallel)
        options = engine(moe_a2a_backend=backend, chunked_prefill_size=8)
        assert check(arch, dims, options) == []
        found = forced_logits(Groups.of(dims, rank, split), case.model, options, case.sequences, PROMPT)
        mine = [i for i in range(len(case.sequences)) if i % dims.dp_size == dims.dp_rank(rank)]
        try:
            assert sorted(found) == mine
            for i, rows in found.items():
                check_close(rows, case.expected[i], PROMPT)
        except AssertionError:
            failures.append(f"{parallel} {backend}: {traceback.format_exc(limit=1)}")
    return failures


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3", "gemma3_text"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param), LENGTH, SEQUENCES)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_mapping_equals_the_oracle(case: Case, world: int) -> None:
    for rank, failures in enumerate(run_ranks(ParallelDims(world, 1, 1, 1, None), all_mappings, case)):
        assert not failures, f"rank {rank}: {failures[0]} (and {len(failures) - 1} more)"
