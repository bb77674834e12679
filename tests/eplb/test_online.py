"""Online updates: what is left alone, what is moved, and the limits on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.eplb.test_planner import skewed
from toolkit.engine.eplb import bench, maps
from toolkit.engine.eplb.online import Rules, shared_out, update
from toolkit.engine.eplb.planner import plan
from toolkit.engine.eplb.pool import Pool
from toolkit.engine.eplb.relabel import moved

Ints = NDArray[np.int64]


def counts(layers: int = 4, experts: int = 64, seed: int = 0, total: float = 1e8) -> Ints:
    load = skewed(layers, experts, seed=seed)
    return np.rint(load / load.sum(1, keepdims=True) * total).astype(np.int64)


def test_a_balanced_layer_is_left_alone_and_a_drifted_one_is_brought_back_with_few_moves() -> None:
    load = counts()
    held = plan(load, 80, num_gpus=16).phy2log_LR
    assert (update(load, held, 16, Rules()).phy2log_LR == held).all()
    drifted = load.copy()
    drifted[2, held[2, 0]] += load[2].sum() // 60  # one expert of GPU 0 becomes hot
    done = update(drifted, held, 16, Rules(tolerance=0.05, budget=1.0, few=1.0))
    assert done.moves_L[[0, 1, 3]].tolist() == [0, 0, 0]
    assert 1 <= done.moves_L[2] <= 10
    assert done.before_L[2] < 0.9 < done.after_L[2]
    assert not done.replanned_L.any() and not done.waiting_L.any()


def test_slots_that_keep_their_expert_are_not_touched() -> None:
    held = plan(counts(), 80, num_gpus=16).phy2log_LR
    done = update(counts(seed=5), held, 16, Rules(budget=1.0))
    touched = (done.phy2log_LR != held).sum(1)
    assert (touched >= done.moves_L).all() and (done.moves_L > 0).all()
    assert (done.moves_L == moved(held, done.phy2log_LR, 16)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.1, 1.0]), st.sampled_from(["global", "hierarchical", "spill"])
)
def test_the_budget_and_the_group_rule_hold_and_nothing_gets_worse(seed: int, budget: float, policy: str) -> None:
    held = plan(counts(seed=seed), 80, 8, 2, 16, policy=policy).phy2log_LR
    after = counts(seed=seed + 1)
    done = update(after, held, 16, Rules(budget=budget), 8, 2, policy)
    maps.check_phy2log(done.phy2log_LR, 64, "new")
    assert (done.after_L >= done.before_L - 1e-9).all()
    limit = int(budget * held.size)
    assert done.moves_L.sum() <= limit or (done.replanned_L.sum() == 1 and (done.moves_L > 0).sum() == 1)
    home = np.arange(80) // 40
    for row in done.phy2log_LR:
        for group in range(8):
            experts = set(range(8 * group, 8 * group + 8))
            if policy == "hierarchical":
                assert len(set(home[np.isin(row, list(experts))].tolist())) == 1
            if policy == "spill":
                assert any(experts <= set(row[home == node].tolist()) for node in range(2))


def test_a_layer_that_few_moves_cannot_mend_is_planned_anew() -> None:
    held = np.tile(np.arange(80) % 64, (1, 1))
    load = np.zeros((1, 64), np.int64)
    load[0, :5] = 10**7  # all load in the five experts of GPU 0
    done = update(load, held, 16, Rules(budget=1.0, few=0.05))
    assert done.replanned_L.tolist() == [True] and done.after_L[0] > 2 * done.before_L[0]


def test_layers_wait_for_the_budget_and_not_for_a_bound_that_nothing_reaches() -> None:
    load = 1000 * np.array([[5, 9, 100, 3, 4, 50, 1, 2]] * 2)
    held = np.tile(np.arange(12) % 8, (2, 1))
    free = update(load, held, 4, Rules(budget=1.0))
    assert free.after_L.max() < 0.95 < free.bound_L.min() and not free.waiting_L.any()
    tight = update(load, held, 4, Rules(budget=0.2, few=0.05))
    assert tight.waiting_L.sum() == 1 and tight.after_L[tight.waiting_L] < tight.after_L[~tight.waiting_L]


def test_sampling_noise_moves_next_to_nothing() -> None:
    assert bench.sampling_noise(skewed(10, 256), windows=4) <= 0.01


def test_following_a_random_walk_costs_little_balance_and_few_moves() -> None:
    walk = bench.random_walk(skewed(8, 256), windows=5)
    assert walk.moved <= 0.05 and walk.full - walk.online <= 0.01
    assert walk.deepseek_moved > 0.8


def test_the_pool_uses_as_many_windows_as_tell_imbalance_from_noise() -> None:
    pool = Pool(tolerance=0.1, gpus=4)  # 4 x 400 assignments are enough
    small, large = np.full((2, 8), 100), np.full((2, 8), 1000)
    pool.add(small)
    assert pool.counts()[0, 0] == 100
    pool.add(small)
    pool.add(small)
    assert pool.counts()[0, 0] == 200, "two of 800 suffice"
    pool.add(large)
    assert pool.counts()[0, 0] == 1000, "a large window is used alone"
    idle = Pool(0.1, 4)
    idle.add(np.zeros((2, 8), np.int64))
    assert not idle.counts().any()


def test_no_load_changes_nothing_and_a_broken_placement_is_refused() -> None:
    held = plan(counts(), 80, num_gpus=16).phy2log_LR
    assert (update(np.zeros((4, 64), np.int64), held, 16, Rules()).phy2log_LR == held).all()
    with pytest.raises(ValueError, match="phy2log has no slot for expert"):
        update(counts(), np.zeros_like(held), 16, Rules())


def test_a_budget_goes_where_it_relieves_most() -> None:
    """A way with a dear first step is taken as a whole, or not at all; one that gains nothing is left."""
    nan = np.nan
    ways = [np.array([1.5, 1.4, 1.35, 1.34]), np.array([1.3, nan, 1.29, 0.9]), np.array([1.1, 1.1, 1.2, 1.3])]
    assert shared_out(ways, 0) == [0, 0, 0]
    assert shared_out(ways, 1) == [1, 0, 0]
    assert shared_out(ways, 2) == [2, 0, 0] and shared_out(ways, 3) == [0, 3, 0]
    assert shared_out(ways, 4) == [1, 3, 0] and shared_out(ways, 9) == [3, 3, 0]
