"""The weighted split of a batch: exact sums, and close to the linear programme's optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eplb.test_planner import skewed
from toolkit.engine.eplb import weighted
from toolkit.engine.eplb.bench import lp_optimum
from toolkit.engine.eplb.planner import plan


def placed(seed: int, experts: int, slots: int, hot: int = 0) -> np.ndarray:
    """A random placement; expert 0 has ``hot`` replicas more than the others."""
    rng = np.random.default_rng(seed)
    others = rng.integers(0, experts, slots - experts - hot)
    return rng.permutation(np.concatenate([np.arange(experts), np.zeros(hot, np.int64), others]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4000), st.sampled_from([16, 20, 24, 40]))
def test_every_token_goes_to_a_replica_of_its_expert(seed: int, tokens: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    phy2log = plan(skewed(1, 16, seed=seed), slots, num_gpus=4).phy2log_LR[0]
    table = weighted.make_table(phy2log, 16, 4, turn=seed % 3)
    ids = rng.integers(-1, 16, tokens)
    counts = np.bincount(ids[ids >= 0], minlength=16)
    split = weighted.split(counts, table)
    assert (np.add.reduceat(split, table.first_E) == counts).all() and (split >= 0).all()
    chosen = weighted.choose(ids, split, table)
    assert (chosen[ids < 0] == -1).all()
    assert (phy2log[chosen[ids >= 0]] == ids[ids >= 0]).all()
    loads = np.bincount(chosen[ids >= 0] // (slots // 4), minlength=4)
    assert (loads == weighted.split_loads(split, table)).all()


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0])
def test_close_to_the_optimum_and_better_than_an_even_split(exponent: float) -> None:
    pytest.importorskip("scipy")
    load = skewed(4, 256, exponent)
    phy2log, log2phy, logcnt = plan(load, 288, num_gpus=32).maps()
    rng, gained = np.random.default_rng(0), []
    for layer in range(4):
        counts = rng.multinomial(8192, load[layer] / load[layer].sum())
        table = weighted.make_table(phy2log[layer], 256, 32)
        loads = weighted.split_loads(weighted.split(counts, table), table)
        best = 256 / lp_optimum(counts, log2phy[layer], 32, 9)
        even = (counts / logcnt[layer])[phy2log[layer]].reshape(32, 9).sum(1)
        assert best - 0.01 <= 256 / loads.max() <= best + 1e-6
        gained.append(even.max() / loads.max())
    assert min(gained) > 0.999 and np.mean(gained) > 1.02


@pytest.mark.parametrize("seed", range(2))
def test_windows_of_a_hot_expert_share_its_tokens_among_all_its_replicas(seed: int) -> None:
    """23 replicas are in several windows of eight; their GPUs are uneven, and all of them can be made level."""
    phy2log = placed(seed, 64, 128, 22)
    table, rng = weighted.make_table(phy2log, 64, 32, turn=seed), np.random.default_rng(seed)
    hot = slice(table.first_E[0], table.first_E[0] + table.count_E[0])
    assert table.count_E[0] % weighted.WIDTH == 0 and set(table.slot_P[hot]) == set(np.flatnonzero(phy2log == 0))
    assert np.isclose(np.bincount(table.slot_P[hot], weights=table.even_P[hot])[np.flatnonzero(phy2log == 0)],
                      1 / (phy2log == 0).sum()).all()  # fmt: skip
    counts = rng.integers(0, 200, 64)
    counts[0] = 12_000
    assert balancedness(counts, table) >= optimum(counts, phy2log, 32) - 0.01


@pytest.mark.parametrize(("experts", "slots", "gpus"), [(128, 144, 2), (128, 160, 8), (256, 320, 64), (384, 512, 64)])
def test_close_to_the_optimum_when_the_load_has_changed_since_the_placement(
    experts: int, slots: int, gpus: int
) -> None:
    load, rng = skewed(3, experts, 0.6), np.random.default_rng(1)
    for row, held in zip(load, plan(load, slots, num_gpus=gpus).phy2log_LR):
        changed = row * np.exp(rng.normal(0.0, 0.1, experts))
        counts = rng.multinomial(16384, changed / changed.sum())
        table = weighted.make_table(held, experts, gpus)
        assert balancedness(counts, table) >= optimum(counts, held, gpus) - 0.01


def balancedness(counts: np.ndarray, table: weighted.Table) -> float:
    loads = weighted.split_loads(weighted.split(counts, table), table)
    assert loads.sum() == counts.sum()
    return float(loads.mean() / loads.max())


def optimum(counts: np.ndarray, phy2log: np.ndarray, gpus: int) -> float:
    """The linear programme's, over replicas on any GPU."""
    pytest.importorskip("scipy")
    replicas = [np.flatnonzero(phy2log == expert) for expert in range(len(counts))]
    log2phy = np.full((len(counts), max(map(len, replicas))), -1)
    for expert, own in enumerate(replicas):
        log2phy[expert, : len(own)] = own
    return float(counts.sum() / gpus / lp_optimum(counts, log2phy, gpus, len(phy2log) // gpus))
