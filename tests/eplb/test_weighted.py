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
