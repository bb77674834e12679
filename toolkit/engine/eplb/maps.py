"""The three maps of a placement, the GPU loads that follow from them, and what makes a placement valid.

Pure numpy; knows nothing of how placements are found.
L: layers, E: logical experts, R: slots (physical experts), G: GPUs, X: most replicas of any expert. Slot r is on GPU
r // (R / G), and GPU g on node g // (G / nodes).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.jit import jit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def replica_count(phy2log_LR: Ints, experts: int) -> Ints:
    """Replicas of each expert, [L, E]."""
    layers = len(phy2log_LR)
    offset = np.arange(layers)[:, None] * experts
    return np.bincount((phy2log_LR + offset).ravel(), minlength=layers * experts).reshape(layers, experts)


def log2phy(phy2log_LR: Ints, count_LE: Ints) -> Ints:
    """The slots of each expert in ascending order, [L, E, X], padded with -1."""
    width = int(count_LE.max(initial=0))
    return _fill_log2phy(phy2log_LR, np.full((*count_LE.shape, width), -1, np.int64))


@jit
def _fill_log2phy(phy2log_LR: Ints, out_LEX: Ints) -> Ints:
    for layer in range(phy2log_LR.shape[0]):
        held = np.zeros(out_LEX.shape[1], np.int64)
        for slot in range(phy2log_LR.shape[1]):
            expert = phy2log_LR[layer, slot]
            out_LEX[layer, expert, held[expert]] = slot
            held[expert] += 1
    return out_LEX


def gpu_loads(load_LE: NDArray[np.number], phy2log_LR: Ints, gpus: int) -> Floats:
    """Load of each GPU when replicas share their expert's load evenly, [L, G]."""
    return _gpu_loads(np.asarray(load_LE, np.float64), phy2log_LR, gpus)


@jit
def _gpu_loads(load_LE: Floats, phy2log_LR: Ints, gpus: int) -> Floats:
    (layers, slots), experts = phy2log_LR.shape, load_LE.shape[1]
    load_LG, each = np.zeros((layers, gpus)), slots // gpus
    for layer in range(layers):
        count_E = np.zeros(experts)
        for expert in phy2log_LR[layer]:
            count_E[expert] += 1.0
        for slot in range(slots):
            expert = phy2log_LR[layer, slot]
            load_LG[layer, slot // each] += load_LE[layer, expert] / count_E[expert]
    return load_LG


def balancedness(loads_LG: Floats) -> Floats:
    """mean / max over GPUs in each layer: 1 is even, 1 / G all on one; NaN where there is no load, [L]."""
    top = loads_LG.max(-1)
    even: Floats = loads_LG.mean(-1) / np.where(top > 0, top, np.nan)
    return even


def mean_balancedness(balancedness_L: Floats) -> float:
    """Mean over the layers that carry load; NaN when none does."""
    known = balancedness_L[~np.isnan(balancedness_L)]
    return float(known.mean()) if len(known) else float("nan")


def check_phy2log(phy2log_LR: Ints, experts: int, name: str) -> None:
    """Every entry an expert, every expert placed in every layer.

    Raises:
        ValueError: the layer and expert where that does not hold; ``name`` says which placement.
    """
    if phy2log_LR.ndim != 2:
        raise ValueError(f"{name} has shape {phy2log_LR.shape}: give [layers, slots]")
    if phy2log_LR.size and not 0 <= phy2log_LR.min() <= phy2log_LR.max() < experts:
        outside = phy2log_LR[(phy2log_LR < 0) | (phy2log_LR >= experts)][0]
        raise ValueError(f"{name} names expert {outside}: the model has 0 to {experts - 1}")
    layer, expert = np.nonzero(replica_count(phy2log_LR, experts) == 0)
    if len(layer):
        raise ValueError(f"{name} has no slot for expert {expert[0]} in layer {layer[0]}: each needs at least one")
