"""How unevenly the experts, and the GPUs that hold them, are loaded.

Owns the arithmetic from logical expert counts and a placement to GPU loads, balancedness and imbalance. Pure numpy.
Knows nothing of how counts are recorded (the engine) or where they lie (records/).
Load is in (token, expert) assignments. Shape letters: W windows, L MoE layers, E logical experts, P slots (physical
experts), G GPUs (EP ranks). Slot p is on GPU p // (P / G).
Read next: load.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.records.experts import ExpertCounts

Floats = NDArray[np.float64]


def gpu_loads(counts_WLE: NDArray[np.int64], placement_LP: NDArray[np.int32], ep_size: int) -> Floats:
    """Load of each GPU in each window and layer, [W, L, G]; replicas of an expert share its load evenly.

    Evenly, because that is what spreading over replicas aims at. For files without ``slot_counts``.

    Raises:
        ValueError: slots that ``ep_size`` does not divide, a slot of an unknown expert, an expert without a slot.
    """
    (windows, layers, experts), slots = counts_WLE.shape, placement_LP.shape[1]
    assert placement_LP.shape[0] == layers, (placement_LP.shape, counts_WLE.shape)
    if ep_size < 1 or slots % ep_size:
        raise ValueError(f"ep_size={ep_size} does not divide {slots} slots")
    if ((placement_LP < 0) | (placement_LP >= experts)).any():
        raise ValueError(f"placement names experts outside 0..{experts - 1}")
    loads = np.empty((windows, layers, ep_size))
    for layer, expert_of_slot in enumerate(placement_LP):
        replicas = np.bincount(expert_of_slot, minlength=experts)
        if (replicas == 0).any():
            raise ValueError(f"layer {layer}: expert {int(np.argmin(replicas))} has no slot")
        share = counts_WLE[:, layer, expert_of_slot] / replicas[expert_of_slot]
        loads[:, layer] = share.reshape(windows, ep_size, slots // ep_size).sum(-1)
    return loads


def balancedness(loads: Floats) -> Floats:
    """mean / max over the last axis (GPUs): 1 is even, 1/G is everything on one GPU; NaN where there is no load.

    SGLang's balancedness of a layer, without the 1e-5 it adds to both terms, which calls an idle layer balanced.
    """
    top = loads.max(-1)
    even: Floats = loads.mean(-1) / np.where(top > 0, top, np.nan)
    return even


def imbalance(loads: Floats) -> Floats:
    """max / mean, the inverse of ``balancedness``: how many times the mean the busiest GPU has to do.

    TensorRT-LLM's load statistics report max / mean - 1 under this name.
    """
    return 1 / balancedness(loads)


@dataclass(frozen=True)
class WindowLoads:
    """GPU loads of recorder windows, each under the placement that held then.

    Attributes:
        times_W2: Unix seconds of a window's begin and end.
        counts_WLE: assignments of each logical expert.
        loads_WLG: load of each GPU.
        epoch_W: which placement held.
    """

    times_W2: Floats
    counts_WLE: NDArray[np.int64]
    loads_WLG: Floats
    epoch_W: NDArray[np.int64]

    def between(self, begin: float, end: float) -> WindowLoads:
        """The windows that overlap ``begin`` to ``end``; one at the edge is taken whole."""
        return self.where((self.times_W2[:, 0] < end) & (self.times_W2[:, 1] > begin))

    def where(self, rows: NDArray[np.bool_]) -> WindowLoads:
        return WindowLoads(self.times_W2[rows], self.counts_WLE[rows], self.loads_WLG[rows], self.epoch_W[rows])

    def balancedness(self) -> Floats:
        """Of each window, [W]: mean over layers, each weighted with its load; NaN for a window without load."""
        return _weighted(balancedness(self.loads_WLG), self.loads_WLG.sum(-1), axis=1)

    def imbalance(self) -> Floats:
        """Of each window, [W]: sum over layers of the busiest GPU's load / that of the mean GPU's.

        Layers run one after the other, each as long as its busiest GPU: this is the factor on a step's expert time.
        """
        mean = self.loads_WLG.mean(-1).sum(-1)
        factor: Floats = self.loads_WLG.max(-1).sum(-1) / np.where(mean > 0, mean, np.nan)
        return factor

    def excess(self) -> Floats:
        """Of each window, [W]: sum over layers of busiest - mean GPU load: assignments that all others wait for."""
        loads = self.loads_WLG
        wait: Floats = (loads.max(-1) - loads.mean(-1)).sum(-1)
        return wait


def window_loads(experts: ExpertCounts) -> WindowLoads:
    """All windows of ``experts.npz``: the rows that each GPU's slots received, where they were counted.

    Raises:
        ValueError: arrays that do not fit together, or a placement as in ``gpu_loads``.
    """
    counts, times, placement = experts.counts, experts.times, experts.placement
    layers = (len(experts.layer_ids),)
    fits = counts.ndim == 3 and placement.ndim == 3 and layers == counts.shape[1:2] == placement.shape[1:2]
    if not fits or times.shape != (len(counts), 2) or not len(placement) == len(experts.placement_times) > 0:
        raise ValueError(f"shapes do not fit: counts {counts.shape}, times {times.shape}, placement {placement.shape}")
    # The middle of a window: a window ends where a placement changes, and clocks of the two may differ by a little.
    epoch = np.searchsorted(experts.placement_times, times.mean(1), side="right") - 1
    epoch = np.clip(epoch, 0, len(placement) - 1)
    if experts.slot_counts is not None:
        received = experts.slot_counts
        if received.shape != (*counts.shape[:2], placement.shape[2]) or placement.shape[2] % experts.ep_size:
            raise ValueError(f"shapes do not fit: slot_counts {received.shape}, placement {placement.shape}")
        by_gpu = received.reshape(*counts.shape[:2], experts.ep_size, placement.shape[2] // experts.ep_size)
        return WindowLoads(times, counts, by_gpu.sum(-1).astype(np.float64), epoch)
    loads_WLG = np.zeros((*counts.shape[:2], experts.ep_size))
    for index in np.unique(epoch):
        held = epoch == index
        loads_WLG[held] = gpu_loads(counts[held], placement[index], experts.ep_size)
    return WindowLoads(times, counts, loads_WLG, epoch)


@dataclass(frozen=True)
class PointLoad:
    """Expert load in one stretch of time, usually a load point.

    Attributes:
        windows: recorder windows it is made of.
        expert_counts_LE: assignments of each logical expert, summed over the windows.
        gpu_loads_LG: load of each GPU, each window under the placement that held then, summed over the windows.
        balancedness_mean: mean over windows and layers of ``balancedness``, each weighted with its assignments. A
            step waits for its busiest GPU, so a window's skew costs time even where the next window's is opposite.
        imbalance_max: ``imbalance`` of the summed loads, in the layer where it is largest: the lasting skew, which
            a better placement can remove.
    """

    windows: int
    expert_counts_LE: NDArray[np.int64]
    gpu_loads_LG: Floats
    balancedness_mean: float
    imbalance_max: float


def point_load(experts: ExpertCounts, begin: float = -np.inf, end: float = np.inf) -> PointLoad:
    """Load in the recorder windows that overlap ``begin`` to ``end`` (Unix seconds; by default all of them).

    Without a window, or without load in any, both figures are NaN.

    Raises:
        ValueError: as ``window_loads``.
    """
    return summed(window_loads(experts).between(begin, end))


def summed(windows: WindowLoads) -> PointLoad:
    """Windows -> their load as one."""
    loads_WLG, total_LG = windows.loads_WLG, windows.loads_WLG.sum(0)
    loaded = loads_WLG.sum() > 0
    weight = loads_WLG.sum(-1)
    return PointLoad(
        windows=len(loads_WLG),
        expert_counts_LE=windows.counts_WLE.sum(0),
        gpu_loads_LG=total_LG,
        balancedness_mean=float(_weighted(balancedness(loads_WLG).ravel(), weight.ravel(), 0)) if loaded else np.nan,
        imbalance_max=float(np.nanmax(imbalance(total_LG))) if loaded else np.nan,
    )


def co_activation(pairs_LEE: NDArray[np.int64], top: int) -> list[tuple[int, int, int, int, float]]:
    """The ``top`` pairs of experts that tokens choose together: layer (index), two experts, tokens, lift.

    Ranked by tokens. Lift is the count over what it would be if each pair's experts were chosen together as often as
    their shares of all pairs say: above 1 they attract each other, and being on one GPU saves a copy of the token.
    """
    upper = np.triu(pairs_LEE, k=1)
    flat = upper.reshape(-1)
    found = []
    for index in np.argsort(flat, kind="stable")[::-1][:top]:
        layer, one, other = (int(x) for x in np.unravel_index(index, upper.shape))
        total, count = float(upper[layer].sum()), int(flat[index])
        if not count:
            break
        share = pairs_LEE[layer].sum(1) / (2 * total)  # of the ends of pairs; a pair has two
        expected = 2 * share[one] * share[other] / (1 - float((share**2).sum())) * total
        found.append((layer, one, other, count, count / expected))
    return found


def cross_node_share(loads_N: Floats, sources_N: Floats) -> float:
    """Share of (token, expert) assignments whose expert is on another node than the token; NaN without load.

    ``loads_N`` are assignments by the node that computes them, ``sources_N`` tokens by the node they are on. What goes
    where is not recorded: the tokens of each node are taken to spread over experts as all tokens do.
    """
    if not loads_N.sum() > 0 or not sources_N.sum() > 0:
        return np.nan
    return float(1 - (loads_N / loads_N.sum() * sources_N / sources_N.sum()).sum())


def _weighted(values: Floats, weights: Floats, axis: int) -> Floats:
    """Mean of the values that exist, weighted; NaN where no weight is left."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    total = weights.sum(axis)
    mean: Floats = (np.nan_to_num(values) * weights).sum(axis) / np.where(total > 0, total, np.nan)
    return mean
