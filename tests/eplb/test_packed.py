"""The row that kernels read, against the split on the host: the kernel's arithmetic on the row's parts, in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.eplb.test_weighted import placed
from toolkit.engine.eplb import weighted
from toolkit.engine.eplb.packed import Layout, pack
from toolkit.engine.eplb.weighted import STIFF, STRIDE, UP, WIDTH


def slots_by_row(ids: np.ndarray, row: np.ndarray, layout: Layout) -> np.ndarray:
    """What ``kernels/replicas.py`` does, all assignments in one block and in float32."""
    parts, at = [], 0
    places = layout.windows * WIDTH
    sizes = [layout.experts] * 3 + [layout.windows, places, places, layout.gpus * layout.holds] + [layout.windows] * 3
    for size in [*sizes, places, layout.gpus**2]:
        parts.append(row[at : at + size].view(np.float32 if len(parts) > 6 else np.int32))
        at += size
    bin_E, at_E, count_E, bin_F, gpu_P, slot_P, held_GH, part_F, ahead_F, inverse_F, even_P, smooth_GG = parts
    real = ids[ids >= 0]
    total = np.bincount(bin_E[real], minlength=layout.bins).astype(np.float32)
    expert_F, even_FX = total[bin_F], even_P.reshape(-1, WIDTH)
    on_FX, held, smooth = (
        gpu_P.reshape(-1, WIDTH) >= 0,
        held_GH.reshape(layout.gpus, -1),
        smooth_GG.reshape(-1, layout.gpus),
    )
    share = even_FX * expert_F[:, None]
    for _ in range(row[at]):
        given = np.abs(share)
        given += on_FX * ((expert_F * part_F - given.sum(1)) * inverse_F)[:, None]
        load = smooth @ (total[: layout.gpus] + np.where(held >= 0, given.ravel()[held], 0).sum(1))
        there = on_FX * load[gpu_P].reshape(-1, WIDTH)
        share += STRIDE * (given + (on_FX * (there.sum(1) * inverse_F)[:, None] - there) / STIFF - np.maximum(share, 0))
    share = np.maximum(share, 0)
    share *= (expert_F * part_F / np.maximum(share.sum(1), 1e-6))[:, None]
    begin = np.floor(share.cumsum(1) - share + (expert_F * ahead_F)[:, None] + UP).ravel()
    seen, out = np.zeros(layout.experts, np.int64), []
    for expert in ids.tolist():
        if expert < 0 or count_E[expert] == 1:
            out.append(-1 if expert < 0 else at_E[expert])
            continue
        own = slice(at_E[expert], at_E[expert] + count_E[expert])
        out.append(slot_P[own][np.flatnonzero(begin[own] <= seen[expert])[-1]])
        seen[expert] += 1
    return np.array(out)


@pytest.mark.parametrize(
    ("experts", "slots", "gpus", "hot"),
    [(16, 24, 4, 0), (16, 16, 4, 0), (64, 96, 6, 0), (32, 60, 12, 20), (8, 40, 20, 9)],
)
def test_a_row_says_what_the_table_says(experts: int, slots: int, gpus: int, hot: int) -> None:
    layout = Layout.of(experts, slots, gpus)
    for seed in range(3):
        row, rng = placed(seed, experts, slots, hot), np.random.default_rng(seed)
        table = weighted.make_table(row, experts, gpus, turn=seed)
        packed = pack(table, layout)
        assert packed.shape == (layout.words,) and packed.dtype == np.int32, "a row's size never changes"
        chance = rng.permutation(np.arange(1, experts + 1) ** -0.8)
        ids = rng.choice(experts, size=1500, p=chance / chance.sum())
        ids[rng.random(1500) < 0.05] = -1
        found = slots_by_row(ids, packed, layout)
        counts = np.bincount(ids[ids >= 0], minlength=experts)
        wanted = weighted.choose(ids, weighted.split(counts, table), table)
        assert (row[found[ids >= 0]] == ids[ids >= 0]).all() and (found[ids < 0] == -1).all()
        assert (found == wanted).mean() > 0.98, "float32 and float64 may round a token differently"
