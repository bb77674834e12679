"""Placement: which slot (physical expert) holds which logical expert, and which replica a rank sends to.

The gate speaks logical experts, dispatchers speak slots; this is the only place that knows both. A layer's maps change
all together and in place (``update``), between two steps, on all ranks between the same two (``manager.py``).
L: MoE layers, E: logical experts, P: slots. Slot p lives on EP rank p // (P / ep_size). Read next: ``replicas.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.eplb.replicas import ALGORITHMS

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """A layer's new placement, and what the choice of replicas makes of it."""

    phy2log_P: Ints
    choice: Any


class Placement:
    """The maps of all MoE layers on one rank.

    Args:
        phy2log_LP: the expert in each slot.
        nodes: that the EP ranks are on, equally many each.
        algorithm: how a replica is chosen (``engine.ep_dispatch_algorithm``).

    Attributes:
        phy2log_LP: int64 [L, P], on the host.
    """

    def __init__(
        self, phy2log_LP: Ints, num_experts: int, ep_rank: int, ep_size: int, device: str,
        nodes: int = 1, algorithm: str = "static",
    ) -> None:  # fmt: skip
        layers, slots = phy2log_LP.shape
        assert slots % ep_size == 0, f"{slots} slots on {ep_size} ranks"
        self.num_experts, self.ep_rank, self.ep_size, self.nodes = num_experts, ep_rank, ep_size, nodes
        self.num_local = slots // ep_size
        self.phy2log_LP = np.array(phy2log_LP, np.int64)
        self._choice = ALGORITHMS[algorithm](layers, num_experts, slots, ep_rank, ep_size, nodes, device)
        for layer in range(layers):
            self.update(layer, self.prepare(self.phy2log_LP[layer]))

    @classmethod
    def trivial(cls, layers: int, num_experts: int, slots: int, ep_rank: int, ep_size: int, device: str) -> Placement:
        """Slot p holds expert p % E in every layer."""
        return cls(np.tile(np.arange(slots) % num_experts, (layers, 1)), num_experts, ep_rank, ep_size, device)

    def prepare(self, phy2log_P: Ints) -> Prepared:
        """What ``update`` needs of a layer's new placement; takes a moment, and may be done beside the steps."""
        return Prepared(phy2log_P, self._choice.prepare(phy2log_P))

    def update(self, layer: int, prepared: Prepared) -> None:
        """Takes a layer's new placement. The weights must be there already."""
        self._choice.update(layer, prepared.choice)
        self.phy2log_LP[layer] = prepared.phy2log_P

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold ``to_slots``."""
        return self._choice.capturable

    def local_experts(self, layer: int) -> list[int]:
        """The expert in each of this rank's slots of MoE layer ``layer``."""
        first = self.ep_rank * self.num_local
        experts: list[int] = self.phy2log_LP[layer, first : first + self.num_local].tolist()
        return experts

    def to_slots(self, layer: int, ids_SK: Tensor) -> Tensor:
        """Logical ids -> slots, for MoE layer ``layer``; -1 stays -1."""
        return self._choice(layer, ids_SK)

    def table(self, layer: int) -> Tensor | None:
        """The map [E + 1] that ``to_slots`` looks ids up in, -1 at its end; None: it does more than that."""
        return self._choice.table(layer)


def start_placement(
    spec: str, broadcast: Callable[[bytes], bytes], leads: bool, layer_ids: tuple[int, ...], experts: int, slots: int,
    ep_size: int, groups: int, nodes: int,
) -> Ints:  # fmt: skip
    """The placement that ``engine.init_expert_location`` names, [L, P]; the same on every rank.

    The leading rank reads (or plans) it and tells the others: a file need not be on every node.

    Args:
        broadcast: gives every rank what the leading one passes.

    Raises:
        ValueError: on every rank, when it cannot be read or does not fit.
    """
    if spec == "trivial":
        return np.tile(np.arange(slots) % experts, (len(layer_ids), 1))
    message = b""
    if leads:
        from toolkit.engine.eplb.formats import read_placement  # which imports the planner

        try:
            found = read_placement(spec, layer_ids, experts, slots, ep_size, groups, nodes)
            message = b"+" + found.astype("<i4").tobytes()
        except ValueError as error:
            message = b"-" + f"engine.{error}".encode()
    message = broadcast(message)
    if message[:1] == b"-":
        raise ValueError(message[1:].decode())
    return np.frombuffer(message[1:], "<i4").astype(np.int64).reshape(len(layer_ids), slots)
