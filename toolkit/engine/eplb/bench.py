"""The planner against its goals and DeepSeek's EPLB: ``python -m toolkit.engine.eplb bench``.

Every figure of a table comes from one run on one thread. Times are CPU time of this process, so that a busy machine
disturbs them little, and best of several; what to compare is their ratio. Rows on measured loads need a data folder
(--data, or WIDEEP_SHARED_DATA, or ../shared/data) and are left out, with a line that says so, where there is none.
58 layers x 256 experts unless a row says otherwise. L: layers, E: experts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb import maps, weighted
from toolkit.engine.eplb.deepseek import Loads, as_floats, deepseek
from toolkit.engine.eplb.jit import COMPILED
from toolkit.engine.eplb.online import Rules, update
from toolkit.engine.eplb.planner import Plan, plan
from toolkit.engine.eplb.relabel import moved

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LAYERS, EXPERTS, SLOTS, GPUS, NODES, GROUPS = 58, 256, 288, 32, 4, 8


@dataclass(frozen=True)
class Row:
    """One line of the table: what was asked, what came out, what DeepSeek's does."""

    what: str
    goal: str
    ours: str
    theirs: str
    met: bool


def table(data: Path | None = None) -> str:
    """Runs everything; a minute or two."""
    loads, notes = synthetic(), []
    folder = data or Path(os.environ.get("WIDEEP_SHARED_DATA") or "../shared/data") / "experts"
    try:
        loads |= measured(folder)
    except OSError:
        notes.append(f"no measured loads in {folder}: rows on them are left out (--data FOLDER)")
    if not COMPILED:
        notes.append("numba is not installed: times are those of plain Python (pip install 'wideep-toolkit[eplb]')")
    rows = [*balance_rows(loads), *time_rows(loads), *spill_rows(loads), *online_rows(loads), *dispatch_rows(loads)]
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("what", "goal", "ours", "theirs")]
    lines = [_line(("", "goal", "measured", "DeepSeek"), widths, "")]
    lines += [_line((r.what, r.goal, r.ours, r.theirs), widths, "ok" if r.met else "SHORT") for r in rows]
    return "\n".join([*lines, *notes])


def _line(cells: tuple[str, ...], widths: list[int], end: str) -> str:
    return "  ".join([*(cell.ljust(max(width, 8)) for cell, width in zip(cells, widths)), end]).rstrip()


# --- loads --------------------------------------------------------------------------------------------


def synthetic(layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, Floats]:
    """Power laws (exponent in the name), shuffled anew in each layer, and a log-normal load."""
    rng = np.random.default_rng(0)
    rank = np.arange(1, experts + 1)
    loads = {f"power {a}": np.stack([rng.permutation(rank**-a) for _ in range(layers)]) for a in (0.3, 0.6, 1.0)}
    return loads | {"log-normal": np.exp(rng.normal(0.0, 1.0, (layers, experts)))}


def measured(folder: Path) -> dict[str, Floats]:
    """DeepSeek-R1 (58 x 256) and DeepSeek-V2-Lite (26 x 64), where their files are."""
    with np.load(folder / "deepseek_r1_fp4_logical_count.npz", allow_pickle=False) as file:
        counts = file[file.files[0]].astype(np.float64)
    loads = {"DeepSeek-R1": counts[counts.sum(1) > 0]}
    for domain in ("law", "summary"):
        tokens = np.load(folder / f"esft_dsv2lite_{domain}_tokens.npy", allow_pickle=False)
        loads[f"V2-Lite {domain}"] = np.stack([np.bincount(t.ravel(), minlength=64) for t in tokens]).astype(float)
    return loads


# --- rows ---------------------------------------------------------------------------------------------


def balance_rows(loads: dict[str, Floats]) -> Iterator[Row]:
    """Balancedness as a part of its bound, global and hierarchical; and the worst case against DeepSeek's."""
    least = (np.inf, "")
    for name, load in loads.items():
        sizes = ((SLOTS, GPUS), (SLOTS, 72), (320, 64)) if load.shape[1] == EXPERTS else ((72, 8), (80, 16))
        for slots, gpus in sizes:
            for policy, nodes in (("global", 1), ("hierarchical", NODES)):
                if policy == "hierarchical" and gpus > GPUS:
                    continue
                groups = GROUPS if nodes > 1 else 1
                ours = plan(load, slots, groups, nodes, gpus, policy=policy)
                theirs = plan(load, slots, groups, nodes, gpus, policy="deepseek")
                bound, mine, other = map(maps.mean_balancedness, (ours.bound_L, _even(ours), _even(theirs)))
                what = f"{policy}, {name}, {slots} on {gpus}"
                least = min(least, (mine - other, what))
                met = mine >= 0.997 * bound
                yield Row(what, "0.997 x bound", f"{mine / bound:.4f} ({mine:.4f})", f"{other / bound:.4f}", met)
    yield Row("never worse than DeepSeek by", "0.001", f"{max(0.0, -least[0]):.4f}", "-", bool(least[0] >= -0.001))


def _even(planned: Plan) -> Floats:
    return planned.balancedness_L


def time_rows(loads: dict[str, Floats]) -> Iterator[Row]:
    """A full solve of all layers, maps included; DeepSeek's on torch scalars as published, and on Python numbers."""
    for name, load in loads.items():
        if load.shape[1] != EXPERTS:
            continue
        ours = _best_time(lambda load=load: plan(load, SLOTS, num_gpus=GPUS).maps(), 7)  # type: ignore[misc]
        plain = _best_time(lambda load=load: _deepseek(load, as_floats), 1)  # type: ignore[misc]
        published = _published(load)
        ratio = published / ours
        theirs = f"{published:.2f} s as published, {1e3 * plain:.0f} ms ({plain / ours:.0f} x) without torch"
        yield Row(
            f"full solve, {name}", "7 ms, 150 x", f"{1e3 * ours:.1f} ms, {ratio:.0f} x", theirs,
            ours <= 7e-3 and ratio >= 150,
        )  # fmt: skip


def _deepseek(load: Floats, loads: Loads) -> Ints:
    return deepseek(load, SLOTS, 1, 1, GPUS, loads)


def _published(load: Floats) -> float:
    """Seconds of DeepSeek's loop over elements of a torch tensor; NaN without torch."""
    try:
        import torch
    except ImportError:
        return float("nan")
    torch.set_num_threads(1)
    return _best_time(lambda: _deepseek(load, torch.from_numpy), 1)


def spill_rows(loads: dict[str, Floats]) -> Iterator[Row]:
    """Balance under the group rule with redundant copies anywhere."""
    for name, load in loads.items():
        if load.shape[1] != EXPERTS:
            continue
        ask = (load, SLOTS, GROUPS, NODES, GPUS)
        spilt, theirs = plan(*ask, policy="spill"), plan(*ask, policy="deepseek")
        seconds = _best_time(lambda ask=ask: plan(*ask, policy="spill"), 5)  # type: ignore[misc]
        even, away = maps.mean_balancedness(_even(spilt)), float(spilt.off_home_L.mean())
        yield Row(
            f"spill, {name}", "0.95, 15 % away, 30 ms", f"{even:.4f}, {100 * away:.1f} % away, {1e3 * seconds:.1f} ms",
            f"{maps.mean_balancedness(_even(theirs)):.4f}", even >= 0.95 and away <= 0.15 and seconds <= 0.03,
        )  # fmt: skip


def online_rows(loads: dict[str, Floats], windows: int = 8) -> Iterator[Row]:
    """Drift of 5 % a window, judged on the next window; and sampling noise alone, 64k assignments a layer."""
    for name, load in loads.items():
        if load.shape[1] != EXPERTS:
            continue
        walk = random_walk(load, windows)
        yield Row(
            f"online, 5 % random walk, {name}", "within 0.005, 5 % moved",
            f"{walk.online:.4f} against {walk.full:.4f}, {100 * walk.moved:.1f} % moved",
            f"{100 * walk.deepseek_moved:.0f} % moved", walk.full - walk.online <= 0.005 and walk.moved <= 0.05 + 1e-9,
        )  # fmt: skip
        moves = sampling_noise(load, windows)
        yield Row(f"online, noise alone, {name}", "1 % moved", f"{100 * moves:.2f} % moved", "-", moves <= 0.01)


@dataclass(frozen=True)
class Walk:
    """Mean next-window balancedness of online updates and of full re-plans, and the part of slots each moves."""

    online: float
    full: float
    moved: float
    deepseek_moved: float


def random_walk(load: Floats, windows: int, gpus: int = GPUS, slots: int = SLOTS) -> Walk:
    """Every expert's load takes a log-normal step of 5 % a window; the first window only settles."""
    rng = np.random.default_rng(1)
    load = load * 1e9 / load.sum(1, keepdims=True)
    held = plan(load, slots, num_gpus=gpus).phy2log_LR
    theirs = deepseek(load, slots, 1, 1, gpus)
    figures = []
    for _ in range(windows):
        step = update(np.rint(load).astype(np.int64), held, gpus, Rules())
        held, full = step.phy2log_LR, plan(load, slots, num_gpus=gpus).phy2log_LR
        renewed = deepseek(load, slots, 1, 1, gpus)
        travelled = moved(theirs, renewed, gpus).sum() / renewed.size
        theirs = renewed
        load = load * np.exp(rng.normal(0.0, 0.05, load.shape))
        even = [maps.mean_balancedness(maps.balancedness(maps.gpu_loads(load, p, gpus))) for p in (held, full)]
        figures.append((*even, step.moves_L.sum() / held.size, travelled))
    return Walk(*(float(x) for x in np.mean(figures[1:], axis=0)))


def sampling_noise(load: Floats, windows: int, gpus: int = GPUS, slots: int = SLOTS, assignments: int = 65536) -> float:
    """Most slots that any window moves, as a part of all, when the true load never changes."""
    rng = np.random.default_rng(2)
    part = load / load.sum(1, keepdims=True)

    def window() -> Ints:
        return np.stack([rng.multinomial(assignments, row) for row in part])

    held, most = plan(window(), slots, num_gpus=gpus).phy2log_LR, 0.0
    for _ in range(windows):
        step = update(window(), held, gpus, Rules())
        held, most = step.phy2log_LR, max(most, float(step.moves_L.sum() / held.size))
    return most


def dispatch_rows(loads: dict[str, Floats]) -> Iterator[Row]:
    """A batch of 1k tokens x 8 experts split over replicas, against the linear programme and the even split.

    Means over layers, as for balancedness; the worst layer beside it.
    """
    for name, load in loads.items():
        if load.shape[1] != EXPERTS:
            continue
        phy2log, log2phy, logcnt = plan(load, SLOTS, num_gpus=GPUS).maps()
        rng = np.random.default_rng(3)
        short, even_short, seconds = [], [], []
        for layer in range(0, len(load), 3):
            counts = rng.multinomial(8192, load[layer] / load[layer].sum())
            table = weighted.make_table(phy2log[layer], EXPERTS, GPUS)
            best = 8192 / GPUS / lp_optimum(counts, log2phy[layer], GPUS, SLOTS // GPUS)
            split = weighted.split_loads(weighted.split(counts, table), table)
            even = (counts / logcnt[layer])[phy2log[layer]].reshape(GPUS, -1).sum(1)
            short.append(best - split.mean() / split.max())
            even_short.append(best - even.mean() / even.max())
            seconds.append(_split_time(counts, table))
        yield Row(
            f"weighted dispatch, {name}", "0.01 below LP, 60 us",
            f"{np.mean(short):.4f} (worst {np.max(short):.4f}) below, {1e6 * np.mean(seconds):.0f} us",
            f"even split: {np.mean(even_short):.4f} below",
            bool(np.max(short) <= 0.01 and np.mean(seconds) <= 60e-6),
        )  # fmt: skip


def _split_time(counts: Ints, table: weighted.Table) -> float:
    def hundred() -> None:
        for _ in range(100):
            weighted.split(counts, table)

    return _best_time(hundred, 5) / 100


def lp_optimum(counts_E: Ints, log2phy_EX: Ints, gpus: int, slots: int) -> float:
    """Least possible largest GPU load of a batch, when replicas may share its tokens in any way."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    expert, place = np.nonzero(log2phy_EX >= 0)
    shares = np.arange(len(expert))
    last = len(expert)  # the variable that is minimised
    gpu = log2phy_EX[expert, place] // slots
    rows, columns = np.concatenate([gpu, np.arange(gpus)]), np.concatenate([shares, np.full(gpus, last)])
    values = np.concatenate([np.ones(last), -np.ones(gpus)])
    at_most = coo_array((values, (rows, columns)), shape=(gpus, last + 1)).tocsr()
    exactly = coo_array((np.ones(last), (expert, shares)), shape=(len(counts_E), last + 1)).tocsr()
    cost = np.zeros(last + 1)
    cost[last] = 1.0
    solved = linprog(cost, at_most, np.zeros(gpus), exactly, counts_E.astype(np.float64), method="highs")
    return float(solved.fun)


def _best_time(call: Callable[[], Any], times: int) -> float:
    """Least CPU seconds of a call; where there is time for several, the first compiles and warms caches."""
    if times > 1:
        call()
    best = np.inf
    for _ in range(times):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return float(best)
