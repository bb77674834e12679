"""Placement: which slot (physical expert) holds which logical expert, and which replica a rank sends to.

The gate speaks logical experts, dispatchers speak slots; this is the only place that knows both.
L: MoE layers, E: logical experts, P: slots. Slot p lives on EP rank p // (P / ep_size).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Placement:
    """The maps of all MoE layers on one rank.

    Attributes:
        phy2log: int64 [L, P], the expert in each slot.
        dispatch_LE: int64 [L, E], the slot this rank sends an expert's tokens to ("static" choice): a replica of
            its own if it has one, else replicas are dealt to ranks in turn.
    """

    def __init__(self, phy2log: Tensor, num_experts: int, ep_rank: int, ep_size: int, device: str) -> None:
        layers, slots = phy2log.shape
        assert slots % ep_size == 0, f"{slots} slots on {ep_size} ranks"
        self.num_experts, self.ep_rank, self.ep_size = num_experts, ep_rank, ep_size
        self.num_local = slots // ep_size
        self.phy2log = phy2log.to(device)
        table = [[self._choose(phy2log[layer], expert) for expert in range(num_experts)] for layer in range(layers)]
        self.dispatch_LE = torch.tensor(table, dtype=torch.long, device=device).view(layers, num_experts)

    @classmethod
    def trivial(cls, layers: int, num_experts: int, slots: int, ep_rank: int, ep_size: int, device: str) -> Placement:
        """Slot p holds expert p % E in every layer."""
        phy2log = (torch.arange(slots) % num_experts).expand(layers, slots).contiguous()
        return cls(phy2log, num_experts, ep_rank, ep_size, device)

    def _choose(self, phy2log_P: Tensor, expert: int) -> int:
        slots: list[int] = torch.nonzero(phy2log_P == expert).flatten().tolist()
        assert slots, f"expert {expert} has no slot"
        own = [slot for slot in slots if slot // self.num_local == self.ep_rank]
        return own[0] if own else slots[self.ep_rank % len(slots)]

    def local_experts(self, layer: int) -> list[int]:
        """The expert in each of this rank's slots of MoE layer ``layer``."""
        first = self.ep_rank * self.num_local
        experts: list[int] = self.phy2log[layer, first : first + self.num_local].tolist()
        return experts

    def to_slots(self, layer: int, ids_SK: Tensor) -> Tensor:
        """Logical ids -> slots, for MoE layer ``layer``; -1 stays -1."""
        return torch.where(ids_SK >= 0, self.dispatch_LE[layer][ids_SK.clamp_min(0)], -1)
