"""The planner: expert loads in, a placement out. numpy in, numpy out; needs no torch, and numba only to be fast.

    phy2log, log2phy, logcnt = rebalance(weight, num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)

Owns the policies and what they promise. Knows nothing of the running engine, of moving weights (migrate.py) or of
when to plan (online.py). Read next: kernels.py (counts and packing), solve.py, groups.py, spill.py; deepseek.py is the
baseline.
L: layers, E: logical experts, R: slots (physical experts), G: GPUs, X: most replicas of any expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolkit.engine.eplb import maps
from toolkit.engine.eplb.deepseek import deepseek
from toolkit.engine.eplb.groups import global_bound, home_nodes, members_of
from toolkit.engine.eplb.jit import jit
from toolkit.engine.eplb.relabel import relabel
from toolkit.engine.eplb.solve import solve_nodes
from toolkit.engine.eplb.spill import off_home_share, spill_layer
from toolkit.registry import unknown

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 1e-3
TRIES = 40
SPILL_ROUNDS = 8


@dataclass(frozen=True)
class Plan:
    """A placement and how good it is for the load it was made from.

    Attributes:
        phy2log_LR: expert in each slot.
        experts: logical experts.
        policy: the one that was used (``auto`` is resolved).
        balancedness_L: mean / max GPU load, replicas sharing evenly; NaN in layers without load.
        bound_L: the same at a proven lower bound of the largest GPU load: no placement of this policy is above it.
        off_home_L: part of the load on replicas away from their group's home node; 0 but for ``spill``.
    """

    phy2log_LR: Ints
    experts: int
    policy: str
    balancedness_L: Floats
    bound_L: Floats
    off_home_L: Floats

    @property
    def gap_L(self) -> Floats:
        """How far each layer may be from the best placement, as a part of it; 0 is proven to be best."""
        return 1 - self.balancedness_L / self.bound_L

    def maps(self) -> tuple[Ints, Ints, Ints]:
        """(phy2log [L, R], log2phy [L, E, X] padded with -1, logcnt [L, E])."""
        logcnt = maps.replica_count(self.phy2log_LR, self.experts)
        return self.phy2log_LR, maps.log2phy(self.phy2log_LR, logcnt), logcnt


def rebalance(
    weight: ArrayLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    prev: ArrayLike | None = None,
    policy: str = "auto",
) -> tuple[Ints, Ints, Ints]:
    """``plan`` with the signature and the result of DeepSeek's ``rebalance_experts``.

    Returns:
        phy2log [L, R], the expert in each slot; log2phy [L, E, X], the slots of each expert padded with -1;
        logcnt [L, E], replicas of each expert.
    """
    return plan(weight, num_replicas, num_groups, num_nodes, num_gpus, prev, policy).maps()


def plan(
    weight: ArrayLike,
    num_replicas: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_gpus: int = 1,
    prev: ArrayLike | None = None,
    policy: str = "auto",
    tolerance: float = TOLERANCE,
    tries: int = TRIES,
) -> Plan:
    """A placement of all layers for the given loads.

    Args:
        weight: load of each logical expert, [L, E]; any unit, >= 0. A layer without load keeps ``prev``.
        num_replicas: slots; at least E, a multiple of ``num_gpus``.
        num_groups: expert groups of the gate (1: it knows none); consecutive experts form a group.
        num_nodes: nodes; GPUs of a node are consecutive.
        prev: the placement in force, [L, R]. The new one is renamed to keep as many replicas where they are as its
            loads allow; that changes which GPU is which, not how balanced they are.
        policy: ``global`` any replica anywhere; ``hierarchical`` a group's experts on one node; ``spill`` one copy of
            each on the home node, redundant ones anywhere; ``deepseek`` the baseline; ``auto`` DeepSeek's choice:
            hierarchical where nodes divide groups, else global.
        tolerance: how close to the lower bound is close enough.
        tries: at most so many changes of the replica counts in a layer (and node) that misses it.

    Raises:
        ValueError: sizes that do not fit together, a load that is no number, an unknown policy.
    """
    load_LE = np.ascontiguousarray(weight, np.float64)
    policy = _check(load_LE, num_replicas, num_groups, num_nodes, num_gpus, policy)
    phy2log, bound, away = _POLICIES[policy](
        Problem(load_LE, num_replicas, num_groups, num_nodes, num_gpus, tolerance, tries)
    )
    if prev is not None:
        before = np.asarray(prev, np.int64)
        if before.shape != phy2log.shape:
            raise ValueError(f"prev has shape {before.shape}, not {phy2log.shape}: leave it out when the slots change")
        maps.check_phy2log(before, load_LE.shape[1], "prev")
        phy2log = relabel(before, phy2log, num_gpus, num_nodes if policy in ("hierarchical", "spill") else 1)
        phy2log = np.where(load_LE.sum(1)[:, None] > 0, phy2log, before)
    even = maps.balancedness(maps.gpu_loads(load_LE, phy2log, num_gpus))
    mean: Floats = load_LE.sum(1) / num_gpus
    return Plan(phy2log, load_LE.shape[1], policy, even, mean / np.where(bound > 0, bound, np.nan), away)


@dataclass(frozen=True)
class Problem:
    """The checked arguments of ``plan``."""

    load_LE: Floats
    replicas: int
    groups: int
    nodes: int
    gpus: int
    tolerance: float
    tries: int


Solved = tuple[Ints, Floats, Floats]  # phy2log [L, R], least possible largest GPU load [L], part off home [L]


def _global(p: Problem) -> Solved:
    layers, experts = p.load_LE.shape
    members = np.broadcast_to(np.arange(experts), (layers, 1, experts))
    floor = np.zeros(layers)
    phy2log = solve_nodes(
        p.load_LE, np.ascontiguousarray(members), p.gpus, p.replicas // p.gpus, floor, p.tolerance, p.tries
    )
    return phy2log, _reached_bound(p, phy2log), floor


def _reached_bound(p: Problem, phy2log: Ints) -> Floats:
    reached = maps.gpu_loads(p.load_LE, phy2log, p.gpus).max(1)
    return global_bound(p.load_LE, p.replicas, p.gpus, reached, 2 * p.tolerance)


def _hierarchical(p: Problem) -> Solved:
    layers, experts = p.load_LE.shape
    home_LK, bound = home_nodes(p.load_LE, p.groups, p.nodes, p.replicas, p.gpus)
    members, gpus, slots = members_of(home_LK, p.nodes, experts), p.gpus // p.nodes, p.replicas // p.gpus
    # A node is a small problem: more tries cost no more than those of a whole layer.
    phy2log = solve_nodes(p.load_LE, members, gpus, slots, bound, p.tolerance, p.nodes * p.tries)
    return phy2log, bound, np.zeros(layers)


def _spill(p: Problem) -> Solved:
    experts = p.load_LE.shape[1]
    home_LK, _ = home_nodes(p.load_LE, p.groups, p.nodes, p.replicas, p.gpus)
    home_LE = np.repeat(home_LK, experts // p.groups, axis=1)
    bound = global_bound(p.load_LE, p.replicas, p.gpus, np.zeros(len(p.load_LE)), 0.0)  # the simple one
    phy2log = _spill_layers(
        p.load_LE, home_LE, p.gpus // p.nodes, p.replicas // p.gpus, bound, p.tolerance, SPILL_ROUNDS
    )
    return phy2log, bound, off_home_share(p.load_LE, phy2log, home_LE, p.nodes)


@jit
def _spill_layers(
    load_LE: Floats, home_LE: Ints, gpus: int, slots: int, bound_L: Floats, tolerance: float, tries: int
) -> Ints:
    nodes = int(home_LE.max()) + 1
    phy2log = np.empty((len(load_LE), nodes * gpus * slots), np.int64)
    for layer in range(len(load_LE)):
        phy2log[layer] = spill_layer(load_LE[layer], home_LE[layer], gpus, slots, bound_L[layer], tolerance, tries)
    return phy2log


def _deepseek(p: Problem) -> Solved:
    phy2log = deepseek(p.load_LE, p.replicas, p.groups, p.nodes, p.gpus)
    return phy2log, _reached_bound(p, phy2log), np.zeros(len(p.load_LE))


_POLICIES: dict[str, Callable[[Problem], Solved]] = {
    "global": _global,
    "hierarchical": _hierarchical,
    "spill": _spill,
    "deepseek": _deepseek,
}
POLICIES = ("auto", *_POLICIES)


def _check(load_LE: Floats, replicas: int, groups: int, nodes: int, gpus: int, policy: str) -> str:
    """The policy to use; everything that is wrong with the sizes is a ValueError."""
    if load_LE.ndim != 2 or not load_LE.size:
        raise ValueError(f"weight has shape {load_LE.shape}: give [layers, experts]; sum windows up first")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ValueError("weight has a negative or not finite entry: loads are counts, or estimates of them, >= 0")
    if policy not in POLICIES:
        raise ValueError(unknown("policy", policy, list(POLICIES)))
    experts = load_LE.shape[1]
    for name, value in (("num_groups", groups), ("num_nodes", nodes), ("num_gpus", gpus)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if replicas < experts:
        raise ValueError(f"num_replicas={replicas} is less than {experts} experts: each needs a slot")
    if replicas % gpus:
        up = -(-replicas // gpus) * gpus
        raise ValueError(f"num_gpus={gpus} does not divide num_replicas={replicas}: use {up} slots")
    if experts % groups:
        raise ValueError(f"num_groups={groups} does not divide {experts} experts: use 1 if the gate knows no groups")
    fits = groups % nodes == 0 and gpus % nodes == 0
    if policy == "auto":
        return "hierarchical" if fits and nodes > 1 else "global"
    if policy in ("hierarchical", "spill") and not fits:
        raise ValueError(
            f"policy={policy} needs num_nodes={nodes} to divide num_groups={groups} and num_gpus={gpus}: use global"
        )
    if policy == "deepseek" and groups % nodes == 0 and gpus % nodes:
        raise ValueError(f"policy=deepseek needs num_nodes={nodes} to divide num_gpus={gpus}: use global")
    return policy
