"""The planner: invariants of every policy, the bound, DeepSeek's test vector, and the odd sizes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from toolkit.engine.eplb.bounds import lower_bound, simple_bound
from toolkit.engine.eplb.kernels import descending
from toolkit.engine.eplb.planner import POLICIES, plan, rebalance
from toolkit.engine.eplb.relabel import moved

Floats = NDArray[np.float64]

# weights, placement of DeepSeek's published example: 16 slots, 4 groups, 2 nodes, 8 GPUs
EXAMPLE = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PUBLISHED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def skewed(layers: int, experts: int, exponent: float = 0.6, seed: int = 0) -> Floats:
    """A power law, shuffled anew in each layer."""
    rng = np.random.default_rng(seed)
    law = np.arange(1, experts + 1) ** -exponent
    return np.stack([rng.permutation(law) for _ in range(layers)])


def assert_valid(load: Floats, slots: int, gpus: int, result: tuple[NDArray[np.int64], ...]) -> None:
    """Every expert placed, exact shapes, maps inverse to each other."""
    phy2log, log2phy, logcnt = result
    layers, experts = load.shape
    assert phy2log.shape == (layers, slots) and slots % gpus == 0
    assert logcnt.min() >= 1 and (logcnt.sum(1) == slots).all()
    assert log2phy.shape == (layers, experts, logcnt.max())
    assert ((log2phy >= 0).sum(-1) == logcnt).all()
    for layer, expert in itertools.product(range(layers), range(experts)):
        held = log2phy[layer, expert, : logcnt[layer, expert]]
        assert (phy2log[layer, held] == expert).all() and len(set(held.tolist())) == len(held)
        assert (log2phy[layer, expert, logcnt[layer, expert] :] == -1).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, int, int, int, int]:
    """Loads and sizes that fit every policy: (load, slots, groups, nodes, gpus)."""
    nodes = draw(st.sampled_from([1, 2, 3, 4]))
    groups = nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 5))
    gpus = nodes * draw(st.integers(1, 4))
    least = -(-experts // gpus)
    slots = gpus * draw(st.integers(least, least + 3))
    load = draw(st.lists(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts), min_size=1, max_size=3))
    return np.array(load, float), slots, groups, nodes, gpus


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(POLICIES), st.booleans())
def test_every_placement_is_valid_and_none_beats_the_bound(
    problem: tuple[Floats, int, int, int, int], policy: str, replan: bool
) -> None:
    load, slots, groups, nodes, gpus = problem
    prev = plan(load[:, ::-1], slots, groups, nodes, gpus, policy=policy).phy2log_LR if replan else None
    planned = plan(load, slots, groups, nodes, gpus, prev, policy)
    assert_valid(load, slots, gpus, planned.maps())
    known = load.sum(1) > 0
    assert (np.isnan(planned.balancedness_L) == ~known).all()
    assert (planned.balancedness_L[known] <= planned.bound_L[known] * (1 + 1e-6)).all()
    home = np.arange(slots) // (slots // nodes)
    if planned.policy == "hierarchical":
        for row in planned.phy2log_LR:
            group = row // (load.shape[1] // groups)
            assert all(len(set(home[group == g].tolist())) == 1 for g in range(groups)), "a group is on two nodes"
    if planned.policy == "spill":
        assert ((planned.off_home_L >= 0) & (planned.off_home_L < 1)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=4, max_size=4), st.integers(0, 2))
def test_the_bound_holds_for_the_best_of_all_placements(load: list[int], extra: int) -> None:
    loads, gpus = np.array(load, float), 2
    slots = (4 + 2 * extra) // gpus
    if slots > 4:
        return
    best = np.inf
    for left in itertools.combinations(range(4), slots):  # no GPU holds an expert twice
        for right in itertools.combinations(range(4), slots):
            count = np.bincount([*left, *right], minlength=4)
            if count.all():
                share = loads / count
                best = min(best, max(share[list(left)].sum(), share[list(right)].sum()))
    assert lower_bound(loads, gpus, slots, simple_bound(loads, descending(loads), gpus, slots)) <= best * (1 + 1e-9)


def test_deepseek_gives_the_published_placement() -> None:
    phy2log, _, logcnt = rebalance(EXAMPLE, 16, 4, 2, 8, policy="deepseek")
    assert phy2log.tolist() == PUBLISHED
    assert logcnt[0].tolist() == np.bincount(PUBLISHED[0], minlength=12).tolist()


def test_packing_reaches_the_bound_where_deepseek_stays_below() -> None:
    load = skewed(8, 256, 0.6)
    ours, theirs = (plan(load, 288, num_gpus=72, policy=policy) for policy in ("global", "deepseek"))
    assert ours.gap_L.max() < 0.0015
    assert theirs.gap_L.mean() > 0.02


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.6, 1.0, 1.5])
@pytest.mark.parametrize(
    ("experts", "slots", "gpus"),
    [(256, 288, 32), (256, 288, 144), (256, 320, 64), (256, 256, 32), (64, 80, 16), (384, 416, 32), (256, 256, 256)],
)
def test_never_worse_than_deepseek(exponent: float, experts: int, slots: int, gpus: int) -> None:
    load = skewed(6, experts, exponent, seed=slots)
    ours, theirs = (plan(load, slots, num_gpus=gpus, policy=policy) for policy in ("global", "deepseek"))
    assert ours.balancedness_L.mean() >= theirs.balancedness_L.mean() - 0.001
    ours, theirs = (plan(load, slots, 8, 4, gpus, policy=policy) for policy in ("hierarchical", "deepseek"))
    assert ours.balancedness_L.mean() >= theirs.balancedness_L.mean() - 0.001


def test_spill_evens_out_nodes_that_the_group_rule_leaves_uneven() -> None:
    load = skewed(6, 256, 0.6)
    load[:, :64] *= 1.4  # two hot groups
    ruled, spilt = (plan(load, 288, 8, 4, 32, policy=policy) for policy in ("hierarchical", "spill"))
    assert spilt.balancedness_L.min() > 0.95 > ruled.balancedness_L.mean()
    assert (spilt.off_home_L < 0.15).all()
    # every expert has a copy on its group's home: some node holds a whole group
    node_of = np.arange(288) // 72
    for row in spilt.phy2log_LR:
        for group in range(8):
            experts = set(range(32 * group, 32 * group + 32))
            assert any(experts <= set(row[node_of == node].tolist()) for node in range(4))


@pytest.mark.parametrize("policy", ["global", "hierarchical", "spill"])
def test_one_expert_with_all_the_load_is_on_every_gpu_it_may_use(policy: str) -> None:
    load = np.zeros((1, 64))
    load[0, 5] = 100
    planned = plan(load, 80, 8, 2, 16, policy=policy)
    holders = {int(gpu) for gpu in np.nonzero((planned.phy2log_LR.reshape(16, 5) == 5).any(1))[0]}
    assert len(holders) == (8 if policy == "hierarchical" else 16), "all GPUs, or all of one node"


def test_layers_without_load_are_spread_evenly_or_kept() -> None:
    load = np.zeros((2, 64))
    load[1] = skewed(1, 64)
    planned = plan(load, 80, num_gpus=16)
    assert planned.maps()[2][0].max() == 2, "redundant slots go to different experts"
    assert np.isnan(planned.balancedness_L[0]) and planned.balancedness_L[1] > 0.99
    kept = plan(load, 80, num_gpus=16, prev=np.tile(np.arange(80) % 64, (2, 1)))
    assert kept.phy2log_LR[0].tolist() == (np.arange(80) % 64).tolist()


def test_more_slots_than_experts_times_gpus_are_filled() -> None:
    assert_valid(skewed(1, 3), 32, 4, rebalance(skewed(1, 3), 32, 1, 1, 4))


def test_gpus_that_nodes_do_not_divide() -> None:
    load = skewed(2, 64)
    assert plan(load, 66, 8, 4, 6).policy == "global"
    with pytest.raises(ValueError, match="needs num_nodes=4 to divide num_groups=8 and num_gpus=6"):
        plan(load, 66, 8, 4, 6, policy="hierarchical")
    with pytest.raises(ValueError, match="policy=deepseek needs num_nodes=4"):
        plan(load, 66, 8, 4, 6, policy="deepseek")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_replicas": 60}, "less than 64 experts"),
        ({"num_replicas": 81}, "does not divide num_replicas=81: use 96 slots"),
        ({"num_groups": 7}, "num_groups=7 does not divide 64"),
        ({"num_nodes": 0}, "num_nodes=0 must be at least 1"),
        ({"policy": "gobal"}, "did you mean global"),
        ({"weight": np.full((1, 64), -1.0)}, "negative or not finite"),
        ({"weight": np.full((1, 64), np.nan)}, "negative or not finite"),
        ({"weight": np.zeros((2, 1, 64))}, "sum windows up first"),
        ({"prev": np.zeros((1, 64), int)}, "leave it out when the slots change"),
        ({"prev": np.zeros((1, 80), int)}, "prev has no slot for expert 1 in layer 0"),
    ],
)
def test_what_does_not_fit_is_explained(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"weight": skewed(1, 64), "num_replicas": 80, "num_gpus": 16} | change
    with pytest.raises(ValueError, match=message):
        plan(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["global", "hierarchical", "spill"])
def test_prev_changes_names_only(policy: str) -> None:
    load = skewed(4, 64, seed=1)
    prev = plan(skewed(4, 64, seed=2), 80, 8, 2, 16, policy=policy).phy2log_LR
    fresh, renamed = plan(load, 80, 8, 2, 16, policy=policy), plan(load, 80, 8, 2, 16, prev, policy)
    np.testing.assert_allclose(fresh.balancedness_L, renamed.balancedness_L)
    assert moved(prev, renamed.phy2log_LR, 16).sum() < moved(prev, fresh.phy2log_LR, 16).sum()
    again = plan(load, 80, 8, 2, 16, renamed.phy2log_LR, policy)
    assert (again.phy2log_LR == renamed.phy2log_LR).all(), "the same load moves nothing"


def test_without_numba_the_same_placement(tmp_path: Path) -> None:
    load = skewed(2, 32)
    np.save(tmp_path / "load.npy", load)
    code = """
import sys
sys.modules["numba"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import numpy as np
from toolkit.engine.eplb.jit import COMPILED
from toolkit.engine.eplb.planner import plan
assert not COMPILED
folder = sys.argv[1]
load = np.load(folder + "/load.npy")
for policy in ("global", "hierarchical", "spill"):
    np.save(f"{folder}/{policy}.npy", plan(load, 40, 4, 2, 8, policy=policy).phy2log_LR)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    for policy in ("global", "hierarchical", "spill"):
        planned = plan(load, 40, 4, 2, 8, policy=policy).phy2log_LR
        assert (np.load(tmp_path / f"{policy}.npy") == planned).all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([(4, 3, 2), (5, 4, 2), (5, 3, 3), (6, 4, 2)]), st.integers(0, 10**6), st.floats(0.3, 3.0))
def test_the_bound_is_never_above_the_best_of_all_placements(
    shape: tuple[int, int, int], seed: int, skew: float
) -> None:
    """Every placement without two copies of an expert on a GPU, tried out."""
    experts, gpus, slots = shape
    load = np.random.default_rng(seed).permutation((1.0 + np.arange(experts)) ** -skew)
    best = np.inf
    sets = list(itertools.combinations(range(experts), slots))
    for chosen in itertools.combinations_with_replacement(sets, gpus):
        count = np.bincount(np.concatenate(chosen), minlength=experts)
        if count.all():
            share = load / count
            best = min(best, max(share[list(gpu)].sum() for gpu in chosen))
    assert lower_bound(load, gpus, slots, simple_bound(load, descending(load), gpus, slots)) <= best * (1 + 1e-9)


def test_the_bound_counts_that_large_replicas_share_the_small_ones() -> None:
    """1 / rank on 72 GPUs of 4 slots: the placement is within 0.3 % of the bound, that of one GPU alone is 6 % off."""
    load = 1.0 / np.arange(1, 257)
    planned = plan(load[None], 288, num_gpus=72)
    assert planned.gap_L[0] < 0.003 and planned.bound_L[0] < 0.9


def test_few_slots_a_node_do_not_pair_the_replicas_of_the_two_hottest() -> None:
    """Experts of 1 and 0.5 on 8 GPUs: the smallest replicas, 6 and 4, would be two too many."""
    load = np.concatenate([[1.0, 0.5], 1.0 / np.linspace(11, 250, 62)])
    planned = plan(load[None], 72, num_gpus=8)
    assert planned.gap_L[0] < 0.003
