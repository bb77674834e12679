"""Mover: carries out one chunk of a schedule on one rank, in two parts: what may take time, and what must not.

``start`` posts the chunk's transfers (from the weights into spare buffers, ``transfers.py``) and returns; steps go on
meanwhile with the old weights and maps, which nothing has touched. When all ranks are ready and have agreed on it,
``commit`` writes the spare buffers into the slots, in place, and takes the new maps: device copies only, queued between
two steps. Nobody writes into a rank's spare buffers again before its copies are done (``ready``). Before a commit
``drop`` forgets the chunk, and the rank is as it was. Who calls what when is the manager's business.
A thread waits for the transfers. Read next: ``manager.py``.
e: slots of this rank.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.eplb.placement import Placement, Prepared
from toolkit.engine.eplb.schedule import COPY, SEND
from toolkit.engine.eplb.transfers import Recv, Send, Transfers
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
        self._expert_bytes = sum(t[0].nbytes for t in tensors)
        ranks = comm.size // placement.nodes  # of the set, on a node
        here = comm.rank // ranks * ranks
        self._transfers = Transfers(tensors, spare, comm, range(here, here + ranks))
        # each slot as it is copied, by layer and tensor: made once, since steps wait for what is done for each
        self._slots = [[slot_words(t) for t in layer.slot_tensors()] for layer in layers]
        self._spare = [slot_words(b) for b in self._transfers.buffers]
        self._transfers.warm_up(self._spare)
        self._chunk: _Chunk | None = None
        self._todo: queue.SimpleQueue[tuple[list[int], Ints, _Chunk]] = queue.SimpleQueue()
        self._arrived = threading.Event()
        self._arrived.set()
        threading.Thread(target=self._wait_for_all, name="eplb-mover", daemon=True).start()
        self.failure = ""

    @property
    def num_bytes(self) -> int:
        """Of the spare buffers."""
        return self._transfers.num_bytes

    @property
    def direct(self) -> bool:
        """Peers on this host are written to without a library between."""
        return bool(self._transfers.direct)

    @property
    def expert_bytes(self) -> int:
        """Of one expert on one rank."""
        return self._expert_bytes

    @property
    def ready(self) -> bool:
        """The chunk has arrived, or failed; or, once committed, its copies are done."""
        return self._arrived.is_set() and self._transfers.settled

    def wait(self, seconds: float) -> None:
        """Until ``ready``, at most so long."""
        if not self._arrived.is_set():
            self._arrived.wait(seconds)
        elif not self.ready:
            time.sleep(min(seconds, 1e-3))

    def seconds(self) -> tuple[float, float]:
        """Device time of the last chunk, when ``ready``: that steps waited for, and beside them."""
        return self._transfers.seconds()

    def start(self, moves_MC: Ints, new_LR: Ints) -> None:
        """Posts a chunk's transfers. An error ends up in ``failure``: nothing can be moved on this rank any more.

        Args:
            moves_MC: the chunk of a ``Schedule``.
            new_LR: the placement it leads to.
        """
        assert self._chunk is None, "a chunk is under way"
        self._chunk = _Chunk()
        try:
            self._post(moves_MC, self._chunk)
        except Exception as error:
            self._fail(error)
        self._arrived.clear()
        self._todo.put((sorted(set(moves_MC[:, 0].tolist())), new_LR, self._chunk))

    def commit(self) -> None:
        """Writes what has arrived, and takes the new maps. All ranks between the same two steps."""
        assert self._chunk is not None and self.ready and not self.failure, self.failure or "nothing is ready"
        chunk, self._chunk = self._chunk, None
        with self._transfers.timed():
            for layer, spare, slots in chunk.writes:
                for held, arrived in zip(self._slots[layer], self._spare):
                    torch._foreach_copy_([held[slot] for slot in slots], [arrived[index] for index in spare])
            for layer, prepared in chunk.layers.items():
                self.layers[layer].slots_changed()
                self.placement.update(layer, prepared)
        self._transfers.written()

    def drop(self) -> None:
        """Forgets the chunk: weights and maps are as they were."""
        self._chunk = None

    # --- transfers ----------------------------------------------------------------------------------

    def _post(self, moves_MC: Ints, chunk: _Chunk) -> None:
        me, used = self.placement.ep_rank, [0] * self.placement.ep_size  # spare slots of each rank
        sends: list[Send] = []
        recvs: list[Recv] = []
        copies: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in self._spare]
        for layer in sorted(set(moves_MC[:, 0].tolist())):
            tensors = self._slots[layer]
            spare_of: dict[int, int] = {}  # slot that is written -> where its weights are
            for _, kind, _, source, target, source_slot, slot, _ in moves_MC[moves_MC[:, 0] == layer].tolist():
                spare = used[target]
                if kind in (SEND, COPY):
                    used[target] += 1
                    assert spare < self.spare, f"a chunk needs more than {self.spare} spare slots"
                if kind == SEND and source == me:
                    sends += [Send(t[source_slot], self._peer(target), i, spare) for i, t in enumerate(tensors)]
                if target != me:
                    continue
                if kind == SEND:
                    recvs += [Recv(self._peer(source), i, spare) for i in range(len(tensors))]
                elif kind == COPY:
                    for (into, out_of), b, t in zip(copies, self._spare, tensors):
                        into.append(b[spare])
                        out_of.append(t[source_slot])
                spare_of[slot] = spare if kind in (SEND, COPY) else spare_of[source_slot]
            if spare_of:
                chunk.writes.append((layer, list(spare_of.values()), list(spare_of)))
        self._transfers.start(sends, recvs, copies)

    def _peer(self, ep_rank: int) -> int:
        """Rank, in the group, that holds the same part of experts as this one."""
        return ep_rank * self.moe_tp + self.comm.rank % self.moe_tp

    def _wait_for_all(self) -> None:
        """The thread: one for all chunks, since to start one is to wait for it."""
        if self._transfers.device.type == "cuda":
            torch.cuda.set_device(self._transfers.device)  # a thread begins with the first
        while True:
            layers, new_LR, chunk = self._todo.get()
            try:
                for layer in layers:
                    chunk.layers[layer] = self.placement.prepare(new_LR[layer])
                self._transfers.finish()
            except Exception as error:
                self._fail(error)
            self._arrived.set()

    def _fail(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        log.error("experts cannot be moved any more, placement and weights stay as they are", exc_info=error)


def slot_words(tensor: Tensor) -> list[Tensor]:
    """Each slot's part of a tensor [e, ...] as a row of one type, so that one kernel copies several."""
    rows = tensor.view(len(tensor), -1).view(torch.uint8)
    return list((rows.view(torch.int64) if rows.shape[1] % 8 == 0 == tensor.data_ptr() % 8 else rows).unbind(0))
