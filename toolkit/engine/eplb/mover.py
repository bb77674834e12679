"""Mover: carries out one chunk of a schedule on one rank, in two parts: what may take time, and what must not.

``start`` posts the chunk's receives (into spare buffers) and sends (from the weights) and returns; steps go on
meanwhile with the old weights and maps, which nothing has touched. When all ranks are ready and have agreed on it,
``commit`` writes the spare buffers into the slots, in place, and takes the new maps: device copies only. Before that
``drop`` forgets the chunk, and the rank is as it was. Who calls what when is the manager's business.
Transfers have a process group of their own, and a thread waits for them. Read next: ``manager.py``.
e: slots of this rank.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.eplb.placement import Placement, Prepared
from toolkit.engine.eplb.schedule import COPY, SEND
from toolkit.engine.parallel import Comm

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


class MovableLayer(Protocol):
    """A MoE layer as the mover sees it."""

    def slot_tensors(self) -> list[Tensor]:
        """All that makes up an expert, each [e, ...] and contiguous; what is written into them takes effect."""
        ...

    def slots_changed(self) -> None:
        """Some slots were overwritten."""
        ...


@dataclass
class _Chunk:
    """Writes that are due at the commit: (layer, spare slots, the slots they go to); and the layers' new maps."""

    layers: dict[int, Prepared] = field(default_factory=dict)
    writes: list[tuple[int, list[int], list[int]]] = field(default_factory=list)


class Mover:
    """Spare buffers and transfers of one rank.

    Args:
        layers: the MoE layers in order, all of one shape.
        comm: the ranks of one whole set of experts, for this alone.
        moe_tp: ranks that split an expert; parts travel between ranks that hold the same part.
        spare: slots of spare buffers; at least a layer's.

    Attributes:
        failure: why nothing can be moved any more; empty while it can.
    """

    def __init__(
        self, layers: Sequence[MovableLayer], placement: Placement, comm: Comm, moe_tp: int, spare: int
    ) -> None:
        self.layers, self.placement, self.comm, self.moe_tp, self.spare = layers, placement, comm, moe_tp, spare
        tensors = layers[0].slot_tensors()
        self._spare = [torch.empty(spare, *t.shape[1:], dtype=t.dtype, device=t.device) for t in tensors]
        self._expert_bytes = sum(t[0].nbytes for t in tensors)
        self._device = tensors[0].device
        self._chunk: _Chunk | None = None
        self._waiting: threading.Thread | None = None
        self.failure = ""

    @property
    def num_bytes(self) -> int:
        """Of the spare buffers."""
        return sum(t.nbytes for t in self._spare)

    @property
    def expert_bytes(self) -> int:
        """Of one expert on one rank."""
        return self._expert_bytes

    @property
    def ready(self) -> bool:
        """The chunk has arrived, or failed."""
        return self._waiting is None or not self._waiting.is_alive()

    def wait(self, seconds: float) -> None:
        """Until ``ready``, at most so long."""
        if self._waiting is not None:
            self._waiting.join(seconds)

    def start(self, moves_MC: Ints, new_LR: Ints) -> None:
        """Posts a chunk's transfers. An error ends up in ``failure``: nothing can be moved on this rank any more.

        Args:
            moves_MC: the chunk of a ``Schedule``.
            new_LR: the placement it leads to.
        """
        assert self._chunk is None, "a chunk is under way"
        self._chunk = _Chunk()
        works: list[dist.Work] = []
        try:
            works = self._post(moves_MC, self._chunk)
        except Exception as error:
            self._fail(error)
        layers = sorted(set(moves_MC[:, 0].tolist()))
        self._waiting = threading.Thread(target=self._wait_for, args=(works, layers, new_LR, self._chunk), daemon=True)
        self._waiting.start()

    def commit(self) -> None:
        """Writes what has arrived, and takes the new maps. All ranks between the same two steps."""
        assert self._chunk is not None and self.ready and not self.failure, self.failure or "nothing is ready"
        chunk, self._chunk = self._chunk, None
        for layer, spare, slots in chunk.writes:
            for tensor, buffer in zip(self.layers[layer].slot_tensors(), self._spare):
                for index, slot in zip(spare, slots):
                    tensor[slot].copy_(buffer[index])
        for layer, prepared in chunk.layers.items():
            self.layers[layer].slots_changed()
            self.placement.update(layer, prepared)

    def drop(self) -> None:
        """Forgets the chunk: weights and maps are as they were."""
        self._chunk = None

    # --- transfers ----------------------------------------------------------------------------------

    def _post(self, moves_MC: Ints, chunk: _Chunk) -> list[dist.Work]:
        me, used = self.placement.ep_rank, 0
        sends: list[tuple[Tensor, int]] = []
        recvs: list[tuple[Tensor, int]] = []
        for layer in sorted(set(moves_MC[:, 0].tolist())):
            tensors = self.layers[layer].slot_tensors()
            spare_of: dict[int, int] = {}  # slot that is written -> where its weights are
            for _, kind, _, source, target, source_slot, slot, _ in moves_MC[moves_MC[:, 0] == layer].tolist():
                if kind == SEND and source == me:
                    sends += [(_bytes(t[source_slot]), self._peer(target)) for t in tensors]
                if target != me:
                    continue
                if kind in (SEND, COPY):
                    spare_of[slot], used = used, used + 1
                    assert used <= self.spare, f"a chunk needs more than {self.spare} spare slots"
                    buffers = [buffer[spare_of[slot]] for buffer in self._spare]
                    if kind == SEND:
                        recvs += [(_bytes(buffer), self._peer(source)) for buffer in buffers]
                    else:
                        for buffer, tensor in zip(buffers, tensors):
                            buffer.copy_(tensor[source_slot])
                else:
                    spare_of[slot] = spare_of[source_slot]
            if spare_of:
                chunk.writes.append((layer, list(spare_of.values()), list(spare_of)))
        return self.comm.exchange(sends, recvs)

    def _peer(self, ep_rank: int) -> int:
        """Rank, in the group, that holds the same part of experts as this one."""
        return ep_rank * self.moe_tp + self.comm.rank % self.moe_tp

    def _wait_for(self, works: list[dist.Work], layers: list[int], new_LR: Ints, chunk: _Chunk) -> None:
        """In a thread: the new maps, and the end of the transfers."""
        try:
            for layer in layers:
                chunk.layers[layer] = self.placement.prepare(new_LR[layer])
            if self._device.type == "cpu":
                for work in works:
                    work.wait()
            elif works:
                stream = torch.cuda.Stream(self._device)
                with torch.cuda.stream(stream):
                    for work in works:
                        work.wait()  # has the stream wait
                stream.synchronize()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        log.error("experts cannot be moved any more, placement and weights stay as they are", exc_info=error)


def _bytes(slot: Tensor) -> Tensor:
    """A slot's part of a tensor as what travels, whatever its type."""
    return slot.flatten().view(torch.uint8)
