"""The contract of every TokenDispatcher that runs on a CPU, on 1, 2 and 4 ranks; tests/gpu holds the others to it."""

from __future__ import annotations

import pytest

from tests.contract.dispatch_cases import ROUTINGS, ROWS, Case, round_trips, rows_meet_their_experts
from tests.dist.ranks import run_ranks
from toolkit.config.engine import EngineConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.moe.dispatch import DISPATCHERS, ExpertShape, make_dispatcher
from toolkit.engine.parallel import Groups

BACKENDS = ["allgather", "all_to_all"]
GPU_BACKENDS = ["deepep", "nvlink"]
ONE_SLOT = ExpertShape(num_slots=1, ep_rank=0, ep_size=1, hidden=8, top_k=1)


def dims(ranks: int) -> ParallelDims:
    return ParallelDims.of(ParallelConfig(ranks, ranks, ranks, enable_dp_attention=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trip(backend: str, ranks: int) -> None:
    results = run_ranks(dims(ranks), round_trips_aligned, backend)
    assert results == [[2 * len(ROWS[ranks]) * len(ROUTINGS)] * 2] * ranks


def round_trips_aligned(groups: Groups, backend: str) -> list[int]:
    return [round_trips(groups, Case(backend, alignment)) for alignment in (1, 8)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_meet_their_experts(backend: str, ranks: int) -> None:
    assert run_ranks(dims(ranks), rows_meet_their_experts, Case(backend, is_extend=(True,))) == [1] * ranks


def test_the_suite_runs_over_every_backend() -> None:
    make_dispatcher("allgather", Groups.single().moe, ONE_SLOT, EngineConfig())  # registers them
    assert sorted(DISPATCHERS) == sorted(BACKENDS + GPU_BACKENDS)


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"engine.moe_a2a_backend=alltoall.*all_to_all.*did you mean all_to_all"):
        make_dispatcher("alltoall", Groups.single().moe, ONE_SLOT, EngineConfig())


def test_deepep_without_its_library_names_the_extra() -> None:
    with pytest.raises(ValueError, match=r"engine.moe_a2a_backend=deepep needs the library deep_ep.*toolkit\[gpu\]"):
        make_dispatcher("deepep", Groups.single().moe, ONE_SLOT, EngineConfig())
