"""GPU loads, balancedness and imbalance on placements whose answer is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.analysis.imbalance import balancedness, co_activation, gpu_loads, imbalance, point_load
from toolkit.records.experts import ExpertCounts


def counts(*layers: list[int]) -> np.ndarray:
    """One window."""
    return np.array([layers], dtype=np.int64)


def two_windows() -> ExpertCounts:
    """Two experts on two GPUs; all load on expert 0 in the first second, on expert 1 in the second."""
    return ExpertCounts(
        counts=np.array([[[30, 0]], [[0, 10]]], dtype=np.int64),
        times=np.array([[100.0, 101.0], [101.0, 102.0]]),
        placement=np.array([[[0, 1]]], dtype=np.int32),
        placement_times=np.array([90.0]),
        layer_ids=np.array([3], dtype=np.int32),
        ep_size=2,
    )


def test_slots_are_dealt_to_gpus_in_order() -> None:
    placement = np.array([[0, 1, 2, 3], [3, 0, 1, 2]], dtype=np.int32)
    loads = gpu_loads(counts([1, 2, 3, 4], [1, 2, 3, 4]), placement, ep_size=2)
    assert loads[0].tolist() == [[3, 7], [5, 5]]


def test_replicas_share_the_load_of_their_expert() -> None:
    # Expert 0 has two redundant copies: slots 0, 4 and 5. GPUs hold [0, 1], [2, 3], [0, 0].
    placement = np.array([[0, 1, 2, 3, 0, 0]], dtype=np.int32)
    loads = gpu_loads(counts([90, 10, 20, 20]), placement, ep_size=3)
    assert loads[0, 0].tolist() == [40, 40, 60]
    assert balancedness(loads)[0, 0] == pytest.approx((140 / 3) / 60)
    assert imbalance(loads)[0, 0] == pytest.approx(60 / (140 / 3))


@pytest.mark.parametrize(
    ("placement", "ep_size", "message"),
    [
        ([[0, 1, 2]], 2, "ep_size=2 does not divide 3 slots"),
        ([[0, 0, 1, 1]], 2, "expert 2 has no slot"),
        ([[0, 1, 2, 7]], 2, r"outside 0\.\.2"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(placement: list[list[int]], ep_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_loads(counts([1, 1, 1]), np.array(placement, dtype=np.int32), ep_size)


def test_an_idle_layer_is_nan_not_balanced() -> None:
    assert math.isnan(balancedness(np.zeros((1, 1, 4)))[0, 0])


def test_windows_that_take_turns_are_unbalanced_each_but_even_in_sum() -> None:
    experts = dataclasses.replace(two_windows(), counts=np.array([[[10, 0]], [[0, 10]]]))
    load = point_load(experts)
    assert load.balancedness_mean == pytest.approx(0.5)
    assert load.imbalance_max == pytest.approx(1.0)


def test_balancedness_is_weighted_with_assignments() -> None:
    experts = dataclasses.replace(two_windows(), counts=np.array([[[30, 0]], [[5, 5]]]))
    assert point_load(experts).balancedness_mean == pytest.approx((30 * 0.5 + 10 * 1.0) / 40)


def test_a_load_point_takes_the_windows_that_overlap_it() -> None:
    first = point_load(two_windows(), 100.5, 100.9)
    assert (first.windows, first.expert_counts_LE.tolist()) == (1, [[30, 0]])
    both = point_load(two_windows(), 100.5, 101.5)
    assert (both.windows, both.gpu_loads_LG.tolist()) == (2, [[30, 10]])
    nothing = point_load(two_windows(), 200, 300)
    assert nothing.windows == 0 and math.isnan(nothing.balancedness_mean) and math.isnan(nothing.imbalance_max)


def test_each_window_is_judged_under_the_placement_of_its_time() -> None:
    # After 101 s both experts lie on the other GPU, so expert 1's load falls on GPU 0 as well.
    experts = dataclasses.replace(
        two_windows(),
        placement=np.array([[[0, 1]], [[1, 0]]], dtype=np.int32),
        placement_times=np.array([90.0, 101.0]),
    )
    assert point_load(experts).gpu_loads_LG.tolist() == [[40, 0]]


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes do not fit"):
        point_load(dataclasses.replace(two_windows(), times=np.zeros((5, 2))))


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 999), min_size=8),
)
def test_load_is_conserved_whatever_the_placement(
    ep_size: int, slots_per_gpu: int, spare: int, seed: int, load: list[int]
) -> None:
    slots = ep_size * slots_per_gpu
    experts = max(1, slots - spare)
    rng = np.random.default_rng(seed)
    placement = rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]))
    values = np.resize(np.array(load, dtype=np.int64), (1, 1, experts))
    loads = gpu_loads(values, placement[None].astype(np.int32), ep_size)
    assert loads.sum() == pytest.approx(values.sum())
    if values.sum():
        assert 1 / ep_size - 1e-9 <= balancedness(loads)[0, 0] <= 1 + 1e-9


def test_co_activation_ranks_by_tokens_and_tells_attraction_from_popularity() -> None:
    pairs = np.zeros((2, 4, 4), np.int64)
    for layer, one, other, count in ((1, 0, 1, 90), (1, 2, 3, 30), (0, 0, 1, 20), (0, 0, 2, 20), (0, 1, 2, 20)):
        pairs[layer, one, other] = pairs[layer, other, one] = count
    found = co_activation(pairs, top=4)
    assert [item[:4] for item in found[:2]] == [(1, 0, 1, 90), (1, 2, 3, 30)]
    assert len(found) == 4 and found[0][4] > 1
    assert found[2][4] == pytest.approx(1)  # all pairs of three experts alike: no attraction
