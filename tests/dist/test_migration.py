"""Experts migrate between ranks while requests are served: logits stay those of transformers, bit by bit the weights.

Forced placements, one after the other, with every dispatcher, every choice of replicas, experts split over ranks, two
nodes, overlap; and a rank that fails in the middle.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.cases import Case, engine
from tests.dist.families import make_case
from tests.dist.migrating import Migrated, migrate_under_load
from tests.dist.ranks import run_ranks
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.records.experts import read_experts, read_rebalances

DEP2 = ParallelConfig(2, 2, 2, enable_dp_attention=True)
DEP4 = ParallelConfig(4, 4, 4, enable_dp_attention=True, moe_dense_tp_size=1)
TIMES = 3


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two MoE layers of 8 experts."""
    return make_case("mixtral", tmp_path_factory.mktemp("mixtral"))


def migrate(case: Case, parallel: ParallelConfig, folder: Path, *args: object, **options: object) -> list[Migrated]:
    settings = {"ep_num_redundant_experts": 4, "enable_eplb": True, "expert_distribution_recorder_window": 3}
    asked = engine(**(settings | options))  # type: ignore[arg-type]
    return run_ranks(ParallelDims.of(parallel), migrate_under_load, case, asked, folder, *args)


def check_done(ranks: list[Migrated]) -> None:
    for rank in ranks:
        assert (rank.rebalances, rank.aborted, rank.failure) == (TIMES, 0, "")
        assert rank.placement == ranks[0].placement, "ranks disagree"
        assert rank.addresses_kept and rank.weights_right


@pytest.mark.parametrize(
    ("backend", "algorithm"), [("all_to_all", "static"), ("allgather", "dynamic"), ("all_to_all", "weighted")]
)
def test_logits_do_not_change_while_experts_move(case: Case, tmp_path: Path, backend: str, algorithm: str) -> None:
    check_done(migrate(case, DEP2, tmp_path, TIMES, moe_a2a_backend=backend, ep_dispatch_algorithm=algorithm))
    lines = read_rebalances(tmp_path)
    assert [line.state for line in lines] == ["done"] * TIMES and [line.trigger for line in lines] == ["request"] * TIMES
    assert all(line.moved_slots > 0 and line.same_node_bytes > 0 and line.cross_node_bytes == 0 for line in lines)
    assert all(line.last_step > line.first_step for line in lines), "no step ran while experts moved"
    assert all(len(line.pauses_ms) == line.chunks + 1 and len(line.transfers_ms) == line.chunks for line in lines)


@pytest.mark.parametrize("layers_per_chunk", [1, None])
def test_four_ranks_on_two_nodes(case: Case, tmp_path: Path, layers_per_chunk: int | None) -> None:
    ranks = migrate(case, DEP4, tmp_path, TIMES, 2, eplb_rebalance_layers_per_chunk=layers_per_chunk)
    check_done(ranks)
    assert all(line.cross_node_sends > 0 for line in read_rebalances(tmp_path))


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(4, 1, 2),  # each expert split over two ranks
        ParallelConfig(4, 2, 2, 2, enable_dp_attention=True),  # two whole sets of experts
        ParallelConfig(4, 2, 4, enable_dp_attention=True),  # attention TP: ranks own slices of the rows
    ],
    ids=["moe-tp2", "moe-dp2", "attention-tp2"],
)
def test_other_mappings(case: Case, tmp_path: Path, parallel: ParallelConfig) -> None:
    check_done(migrate(case, parallel, tmp_path, TIMES, moe_a2a_backend="allgather"))


def test_with_two_batch_overlap(case: Case, tmp_path: Path) -> None:
    check_done(migrate(case, DEP2, tmp_path, TIMES, enable_two_batch_overlap=True))


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_rank_that_fails_in_the_middle_leaves_a_whole_placement(case: Case, tmp_path: Path, chunk: int) -> None:
    """The chunks that all ranks had committed stay, the rest is dropped everywhere, and serving goes on."""
    ranks = migrate(case, DEP2, tmp_path, 1, 1, (1, chunk), eplb_rebalance_layers_per_chunk=1)
    for rank in ranks:
        assert (rank.rebalances, rank.aborted) == (0, 1) and rank.failure
        assert rank.placement == ranks[0].placement and rank.addresses_kept and rank.weights_right
    trivial = [slot % 8 for slot in range(12)]
    changed = [row != trivial for row in ranks[0].placement]
    assert sum(changed) == chunk, "as many layers as were committed"
    (line,) = read_rebalances(tmp_path)
    assert line.state == "aborted" and line.chunks == chunk and "rank 1" in line.reason
    assert (read_experts(tmp_path / "experts.npz").placement[-1] == ranks[0].placement).all()
