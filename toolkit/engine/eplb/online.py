"""Rebalancing a running engine: what to change, from the placement in force and what was counted since.

A layer within tolerance is left alone, and so is one whose imbalance the sampling noise of its window explains. For
the others the fewest expert moves that bring them back are looked for; where a transfer budget does not allow all of
them, those are made that relieve most for what they move. Only a layer that few moves cannot bring back is planned
anew, with GPUs renamed to keep what they hold.
Pure functions of counts and placement: every rank computes the same from the same. Knows nothing of moving weights
(migrate.py) or of when it is called (the manager).
L: layers, E: experts, R: slots, G: GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb import maps
from toolkit.engine.eplb.groups import global_bound, home_nodes
from toolkit.engine.eplb.improve import improve
from toolkit.engine.eplb.planner import plan
from toolkit.engine.eplb.relabel import keep_slots, moved

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Rules:
    """When to move, and how much.

    Attributes:
        tolerance: a layer is left alone while its busiest GPU is within 1 + this of the lower bound.
        sigmas: and while what is beyond is less than so many standard deviations of that GPU's count.
        budget: most slots an update may change, as a part of all slots.
        few: a layer is planned anew when moving this part of its slots does not bring it back.
    """

    tolerance: float = 0.01
    sigmas: float = 4.0
    budget: float = 0.05
    few: float = 0.1


@dataclass(frozen=True)
class Update:
    """What to change.

    Attributes:
        phy2log_LR: the placement to go to; equal to the one in force where nothing is to be done.
        moves_L: slots of each layer that need an expert which their GPU does not hold.
        replanned_L: layers that were planned anew.
        waiting_L: layers that have to wait for the next update because the budget was used up; not those that have the
            best placement that was found, be it above the bound.
        before_L, after_L: balancedness for the given counts.
        bound_L: no placement of the policy has more.
    """

    phy2log_LR: Ints
    moves_L: Ints
    replanned_L: Bools
    waiting_L: Bools
    before_L: Floats
    after_L: Floats
    bound_L: Floats


def update(
    counts_LE: NDArray[np.integer],
    phy2log_LR: Ints,
    gpus: int,
    rules: Rules,
    groups: int = 1,
    nodes: int = 1,
    policy: str = "global",
) -> Update:
    """The next placement, for what was counted under the one in force.

    Args:
        counts_LE: (token, expert) assignments of a window; numbers, not rates: the noise gate needs them.
        groups, nodes, policy: as in ``planner.plan``, and as the placement was made. With ``hierarchical`` and
            ``spill`` single moves stay inside a node.

    Raises:
        ValueError: as ``planner.plan``, or a placement that is none.
    """
    load_LE = np.ascontiguousarray(counts_LE, np.float64)
    layers, slots = phy2log_LR.shape
    maps.check_phy2log(phy2log_LR, load_LE.shape[1], "phy2log")
    kept_together = nodes if policy in ("hierarchical", "spill") else 1
    before_LG = maps.gpu_loads(load_LE, phy2log_LR, gpus)
    if policy == "hierarchical":
        bound_L = home_nodes(load_LE, groups, nodes, slots, gpus)[1]
    else:
        bound_L = global_bound(load_LE, slots, gpus, before_LG.max(1), rules.tolerance)
    target_L = bound_L * (1 + rules.tolerance)
    excess_L = _beyond_noise(load_LE, phy2log_LR, before_LG, target_L, rules.sigmas)

    work = _Work(load_LE, phy2log_LR, gpus, gpus // kept_together, int(rules.budget * layers * slots))
    late = np.flatnonzero(excess_L > 0).tolist()
    ways = [work.way(layer, bound_L[layer], target_L[layer], int(rules.few * slots)) for layer in late]
    for layer, moves in zip(late, shared_out([way / target for way, target in zip(ways, target_L[late])], work.left)):
        work.improve(layer, bound_L[layer], target_L[layer], moves)
    ask = (groups, nodes, policy)
    for layer in np.argsort(-excess_L, kind="stable"):
        if excess_L[layer] > 0 and work.heaviest_L[layer] > target_L[layer] * (1 + rules.tolerance):
            work.plan_anew(int(layer), ask, rules.tolerance)
    new = work.new_LR
    after_LG = maps.gpu_loads(load_LE, new, gpus)
    return Update(
        new,
        work.moves_L,
        work.replanned_L,
        work.waiting_L,
        maps.balancedness(before_LG),
        maps.balancedness(after_LG),
        load_LE.sum(1) / gpus / np.where(bound_L > 0, bound_L, np.nan),
    )


class _Work:
    """An update in the making: the placement so far, and what is left of the budget (``left``, slots)."""

    def __init__(self, load_LE: Floats, phy2log_LR: Ints, gpus: int, node_gpus: int, budget: int) -> None:
        self.load_LE, self.before_LR, self.gpus, self.node_gpus = load_LE, phy2log_LR, gpus, node_gpus
        self.new_LR = phy2log_LR.copy()
        self.heaviest_L = maps.gpu_loads(load_LE, phy2log_LR, gpus).max(1)
        self.moves_L = np.zeros(len(load_LE), np.int64)
        self.replanned_L = np.zeros(len(load_LE), bool)
        self.waiting_L = np.zeros(len(load_LE), bool)
        self.budget = self.left = budget

    def way(self, layer: int, aim: float, limit: float, most: int) -> Floats:
        """Load of the heaviest GPU after each number of moves towards ``limit``, NaN where there is no stop."""
        return self._improved(layer, aim, limit, most)[1]

    def improve(self, layer: int, aim: float, limit: float, moves: int) -> None:
        """Goes so far on the layer's way."""
        if moves:
            self._take(layer, _in_place(self.before_LR[layer], self._improved(layer, aim, limit, moves)[0]))

    def _improved(self, layer: int, aim: float, limit: float, most: int) -> tuple[Ints, Floats]:
        expert_GS, reached_M = self.new_LR[layer].reshape(self.gpus, -1).copy(), np.empty(most + 1)
        improve(self.load_LE[layer], expert_GS, aim, limit, most, self.node_gpus, reached_M)
        return expert_GS, reached_M

    def plan_anew(self, layer: int, ask: tuple[int, int, str], matters: float) -> None:
        """A full plan of the layer, if it gains what ``matters``: a policy may not reach the bound at all.

        When no other layer moves, this one may exceed the budget: else it would wait for ever.
        """
        groups, nodes, policy = ask
        before, slots = self.before_LR[layer : layer + 1], self.before_LR.shape[1]
        load = self.load_LE[layer : layer + 1]
        fresh = plan(load, slots, groups, nodes, self.gpus, before, policy).phy2log_LR
        gain = self.heaviest_L[layer] - maps.gpu_loads(load, fresh, self.gpus).max()
        extra = int(moved(before, fresh, self.gpus)[0] - self.moves_L[layer])
        alone = self.budget > 0 and self.moves_L.sum() == self.moves_L[layer]
        if gain > matters * self.heaviest_L[layer]:
            fits = extra <= self.left or alone
            if fits:
                self._take(layer, fresh[0])
            self.replanned_L[layer], self.waiting_L[layer] = fits, not fits

    def _take(self, layer: int, row_R: Ints) -> None:
        rows = slice(layer, layer + 1)
        moves = int(moved(self.before_LR[rows], row_R[None], self.gpus)[0])
        self.left = max(0, self.left - (moves - int(self.moves_L[layer])))
        self.new_LR[layer], self.moves_L[layer] = row_R, moves
        self.heaviest_L[layer] = maps.gpu_loads(self.load_LE[rows], self.new_LR[rows], self.gpus).max()


def shared_out(ways: Sequence[Floats], budget: int) -> list[int]:
    """How far to go on each way so that the sum of what is reached is least, with ``budget`` moves in all.

    Args:
        ways: what each number of moves reaches, beginning with none; NaN: no stop there.

    Stretches of a way are taken as a whole: those between the corners of its lower convex hull, in order of their
    slope. What is then left of the budget goes to whole stretches that are small enough.
    """
    stretches: list[tuple[float, int, int, int]] = []  # slope, way, from, to
    for index, reached_M in enumerate(ways):
        corners: list[int] = []
        for stop in np.flatnonzero(~np.isnan(reached_M)).tolist():
            while len(corners) > 1 and _slope(reached_M, corners[-2], stop) <= _slope(reached_M, *corners[-2:]):
                corners.pop()
            corners.append(stop)
        stretches += [(_slope(reached_M, a, b), index, a, b) for a, b in itertools.pairwise(corners)]
    far = [0] * len(ways)
    for slope, index, begin, end in sorted(stretches):
        if slope < 0 and far[index] == begin and end - begin <= budget:
            far[index], budget = end, budget - (end - begin)
    return far


def _slope(reached_M: Floats, begin: int, end: int) -> float:
    return float((reached_M[end] - reached_M[begin]) / (end - begin))


def _in_place(before_R: Ints, expert_GS: Ints) -> Ints:
    """The improved layer with every expert that stayed on its GPU in its old slot, [R]."""
    before_GS = before_R.reshape(expert_GS.shape)
    return np.concatenate([keep_slots(before, after) for before, after in zip(before_GS, expert_GS)])


def _beyond_noise(load_LE: Floats, phy2log_LR: Ints, load_LG: Floats, target_L: Floats, sigmas: float) -> Floats:
    """Load of the busiest GPU beyond target and noise, as a part of the target, [L]; <= 0: leave the layer alone.

    The number of assignments of an expert in a window is Poisson: its variance is itself. A GPU that gets the part
    1 / replicas of it has that part squared of the variance.
    """
    gpus = load_LG.shape[1]
    count_LE = maps.replica_count(phy2log_LR, load_LE.shape[1])
    variance_LG = maps.gpu_loads(load_LE / count_LE, phy2log_LR, gpus)
    beyond_LG = load_LG - sigmas * np.sqrt(variance_LG)
    excess: Floats = beyond_LG.max(1) / np.where(target_L > 0, target_L, np.inf) - (target_L > 0)
    return excess
