"""Which replica of an expert a token goes to: ``engine.ep_dispatch_algorithm``.

    static    one replica for each rank: on its own GPU, else on its node, else dealt evenly: least traffic
    dynamic   replicas in turn, row by row: an expert's load is shared evenly whatever rank its tokens come from
    weighted  the batch's tokens split so that GPUs get equally much (weighted.py)

Owns the maps that this needs, one row a layer, always changed in place: their addresses stay, so CUDA graphs stay
valid. Knows no dispatchers and no weights. Source of the first two: SGLang's expert_location_dispatch.py.
L: layers, E: experts, R: slots, X: most replicas an expert can have (R - E + 1), S: rows, K: top-k.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine import fused
from toolkit.registry import Registry

Ints = NDArray[np.int64]


class ReplicaChoice(Protocol):
    """One rank's way from logical experts to slots, for all layers.

    ``capturable``: the host does not look at the ids, so a CUDA graph can hold it.
    """

    capturable: bool

    def prepare(self, phy2log_R: Ints) -> Any:
        """What ``update`` needs of a layer's new placement: the part that takes time, done beside the steps."""
        ...

    def update(self, layer: int, prepared: Any) -> None:
        """The layer has the prepared placement from now on."""
        ...

    def __call__(self, layer: int, ids_SK: Tensor) -> Tensor:
        """Logical ids [S, K] -> slots [S, K]; -1 (padding) stays -1."""
        ...

    def table(self, layer: int) -> Tensor | None:
        """[E + 1], where ``table[ids]`` is all there is to it, so that another kernel can do so; -1 finds the last."""
        ...


class ReplicaChoiceFactory(Protocol):
    def __call__(
        self, layers: int, experts: int, slots: int, ep_rank: int, ep_size: int, nodes: int, device: str
    ) -> ReplicaChoice: ...


ALGORITHMS: Registry[ReplicaChoiceFactory] = Registry("engine.ep_dispatch_algorithm")


@ALGORITHMS.register("static")
class StaticChoice:
    """A table; its last column is for padding, which -1 finds from behind."""

    capturable = True

    def __init__(
        self, layers: int, experts: int, slots: int, ep_rank: int, ep_size: int, nodes: int, device: str
    ) -> None:
        self._experts, self._rank, self._ranks, self._nodes = experts, ep_rank, ep_size, nodes
        self._device = device
        self.table_LE = torch.full((layers, experts + 1), -1, dtype=torch.int64, device=device)

    def prepare(self, phy2log_R: Ints) -> Tensor:
        return staged(nearest(phy2log_R, self._experts, self._ranks, self._nodes, self._rank), self._device)

    def update(self, layer: int, prepared: Tensor) -> None:
        self.table_LE[layer, :-1].copy_(prepared, non_blocking=True)

    def __call__(self, layer: int, ids_SK: Tensor) -> Tensor:
        if fused.supported(ids_SK):
            return fused.lookup(self.table_LE[layer], ids_SK)
        return self.table_LE[layer][ids_SK]

    def table(self, layer: int) -> Tensor | None:
        return self.table_LE[layer]


@ALGORITHMS.register("dynamic")
class DynamicChoice:
    """Row i of this rank takes replica (i + rank) mod replicas."""

    capturable = True

    def __init__(
        self, layers: int, experts: int, slots: int, ep_rank: int, ep_size: int, nodes: int, device: str
    ) -> None:
        self._experts, self._rank, self._device, width = experts, ep_rank, device, slots - experts + 1
        self.slots_LEX = torch.full((layers, experts + 1, width), -1, dtype=torch.int64, device=device)
        self.count_LE = torch.ones((layers, experts + 1), dtype=torch.int64, device=device)

    def prepare(self, phy2log_R: Ints) -> tuple[Tensor, Tensor]:
        count, slots = _replicas(phy2log_R, self._experts)
        return staged(count, self._device), staged(slots, self._device)

    def update(self, layer: int, prepared: tuple[Tensor, Tensor]) -> None:
        count, slots = prepared
        self.count_LE[layer, :-1].copy_(count, non_blocking=True)
        self.slots_LEX[layer, :-1, : slots.shape[1]].copy_(slots, non_blocking=True)

    def __call__(self, layer: int, ids_SK: Tensor) -> Tensor:
        turn_S = torch.arange(self._rank, self._rank + len(ids_SK), device=ids_SK.device)
        return self.slots_LEX[layer][ids_SK, turn_S[:, None] % self.count_LE[layer][ids_SK]]

    def table(self, layer: int) -> Tensor | None:
        return None


@ALGORITHMS.register("weighted")
def make_weighted(
    layers: int, experts: int, slots: int, ep_rank: int, ep_size: int, nodes: int, device: str
) -> ReplicaChoice:
    """Each rank levels its own batch over all GPUs; the sum of even loads is even.

    Ties go to the replica that comes first; each rank begins elsewhere, so that they do not all pick the same one.
    """
    made = WeightedOnHost if device == "cpu" else WeightedOnDevice
    return made(layers, experts, slots, ep_rank, ep_size, nodes, device)


class WeightedOnHost:
    """The split in numpy, of ids on the host."""

    capturable = False

    def __init__(
        self, layers: int, experts: int, slots: int, ep_rank: int, ep_size: int, nodes: int, device: str
    ) -> None:
        from toolkit.engine.eplb import weighted  # compiles with numba

        self._weighted, self._experts, self._rank, self._ranks = weighted, experts, ep_rank, ep_size
        self._tables: list[Any] = [None] * layers

    def prepare(self, phy2log_R: Ints) -> Any:
        return self._weighted.make_table(phy2log_R, self._experts, self._ranks, self._rank)

    def update(self, layer: int, prepared: Any) -> None:
        self._tables[layer] = prepared

    def __call__(self, layer: int, ids_SK: Tensor) -> Tensor:
        table, ids = self._tables[layer], ids_SK.flatten().numpy()
        counts = np.bincount(ids[ids >= 0], minlength=self._experts)
        chosen = self._weighted.choose(ids, self._weighted.split(counts, table), table)
        return torch.from_numpy(chosen).view(ids_SK.shape)

    def table(self, layer: int) -> Tensor | None:
        return None


class WeightedOnDevice:
    """The same split by a kernel that reads a row of fixed size a layer."""

    capturable = True

    def __init__(
        self, layers: int, experts: int, slots: int, ep_rank: int, ep_size: int, nodes: int, device: str
    ) -> None:
        from toolkit.engine.eplb import weighted
        from toolkit.engine.eplb.packed import Layout, pack
        from toolkit.engine.kernels.replicas import weighted_slots

        self._weighted, self._pack, self._slots_of = weighted, pack, weighted_slots
        self._rank, self._ranks, self._device = ep_rank, ep_size, device
        self._layout = Layout.of(experts, slots, ep_size)
        self.table_L = torch.zeros((layers, self._layout.words), dtype=torch.int32, device=device)

    def prepare(self, phy2log_R: Ints) -> Tensor:
        made = self._weighted.make_table(phy2log_R, self._layout.experts, self._ranks, self._rank)
        return staged(self._pack(made, self._layout), self._device)

    def update(self, layer: int, prepared: Tensor) -> None:
        self.table_L[layer].copy_(prepared, non_blocking=True)

    def __call__(self, layer: int, ids_SK: Tensor) -> Tensor:
        w = self._weighted
        slots: Tensor = self._slots_of(ids_SK, self.table_L[layer], self._layout, w.STIFF, w.STRIDE, w.UP)
        return slots

    def table(self, layer: int) -> Tensor | None:
        return None


def staged(values: NDArray[Any], device: str) -> Tensor:
    """A copy on the host from which a GPU can take it without the host waiting."""
    copy = torch.from_numpy(values.copy())
    return copy if device == "cpu" else copy.pin_memory()


def nearest(phy2log_R: Ints, experts: int, ranks: int, nodes: int, rank: int) -> Ints:
    """The slot that ``rank`` sends each expert's tokens to, [E].

    Its own replica, else one on its node, else any: ranks that have to share are dealt to the replicas evenly, those
    whose choice is narrow first, so that the others can make up for it; among equals the first differs from expert to
    expert. Each rank works out its own row, quickly enough to be done beside steps that need the interpreter, too.
    """
    slots, node_ranks = len(phy2log_R) // ranks, ranks // nodes
    count, log2phy = _replicas(phy2log_R, experts)
    table, several = log2phy[:, 0].copy(), np.flatnonzero(count > 1).tolist()
    for expert, number, row in zip(several, count[several].tolist(), log2phy[several].tolist()):
        first = -expert % number
        replicas = row[first:number] + row[:first]
        table[expert] = replicas[_nearest([slot // slots for slot in replicas], rank, node_ranks)]
    return table


def _nearest(owners: list[int], rank: int, node_ranks: int) -> int:
    """Which of an expert's replicas, on the ranks ``owners``, is for ``rank``."""
    if rank in owners:
        return owners.index(rank)
    node, having = rank // node_ranks, set(owners)
    used = [int(owner not in owners[:i]) for i, owner in enumerate(owners)]  # owners take the first of their own
    on_node: dict[int, list[int]] = {}
    for i, owner in enumerate(owners):
        on_node.setdefault(owner // node_ranks, []).append(i)
    if node in on_node:
        before = sum(other not in having for other in range(node * node_ranks, rank))
        return _dealt(used, on_node[node], before)
    for replicas in on_node.values():
        _dealt(used, replicas, node_ranks - len({owners[i] for i in replicas}))
    before = sum(other not in on_node for other in range(node)) * node_ranks + rank % node_ranks
    return _dealt(used, list(range(len(owners))), before)


def _dealt(used: list[int], among: list[int], times: int) -> int:
    """Uses the least used, the first among equals, so many times; the one that would be next."""
    while True:
        low = min(used[i] for i in among)
        least = [i for i in among if used[i] == low]
        if len(least) > times:
            for i in least[:times]:
                used[i] += 1
            return least[times]
        rounds = times // len(among) if len(least) == len(among) else 1
        for i in least:
            used[i] += rounds
        times -= rounds * len(least)


def _replicas(phy2log_R: Ints, experts: int) -> tuple[Ints, Ints]:
    """Replicas of each expert [E], and their slots [E, X] in ascending order, padded with -1."""
    count = np.bincount(phy2log_R, minlength=experts)
    order = np.argsort(phy2log_R, kind="stable")
    expert, first = phy2log_R[order], count.cumsum() - count
    slots = np.full((experts, int(count.max())), -1, np.int64)
    slots[expert, np.arange(len(order)) - first[expert]] = order
    return count, slots
