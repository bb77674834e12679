"""Recorder: what a rank counts of the experts while it serves. ``engine.expert_distribution_recorder_mode``.

    stat         tokens of each logical expert by the gate's top-k ids, and rows that each slot received
    stat_approx  rows received only: nothing is done per token, but a dispatcher that pads may count its padding
    per_pass     as stat, with windows of one pass; and each rank keeps what its slots received, pass by pass
    per_token    as per_pass, and the slots that each token was sent to

Every rank counts the rows it owns, in windows of forward passes that begin and end with the same pass on all ranks. A
full window goes to ``history.py``, which sums it over the ranks beside the steps. Counting is a kernel a layer
(``kernels/counting.py``) on tensors that keep their addresses, so a CUDA graph may hold it; what is counted while
recording is off is thrown away. Source of the modes: SGLang's eplb/expert_distribution.py.
Read next: ``history.py``, ``passes.py``.
L: MoE layers, E: logical experts, P: slots, e: slots of this rank, S: rows, K: top-k.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from toolkit.engine import fused
from toolkit.engine.core import Batch
from toolkit.engine.eplb.history import History
from toolkit.engine.eplb.passes import PassLog
from toolkit.engine.eplb.placement import Placement
from toolkit.engine.eplb.windows import Window

PAIRS_EVERY = 16  # windows: counting pairs costs rows x experts^2, so it is a sample


class Recorder:
    """Counts of one rank.

    Args:
        placement: in force; it changes under the recorder, see ``placement_changes``.
        counting: this rank's received rows are its own; False where another rank of the same experts counts them.
        window: forward passes a window.
        history: takes the windows.
        passes: keeps each pass; None in the modes stat and stat_approx.
        by_ids: count top-k ids; else only what is received.
    """

    def __init__(
        self, layers: int, placement: Placement, counting: bool, window: int, history: History, device: str,
        passes: PassLog | None = None, by_ids: bool = True, pairs_every: int = PAIRS_EVERY,
    ) -> None:  # fmt: skip
        experts = placement.num_experts
        self.placement, self.window, self.history, self.passes = placement, window, history, passes
        self._counting, self._by_ids, self._pairs_every, self._cpu = counting, by_ids, pairs_every, device == "cpu"
        # The last column is for padding: id -1 finds it from behind.
        self._counts = torch.zeros(layers, experts + 1, dtype=torch.int64, device=device)
        self._rows = list(self._counts.unbind(0))  # views: cheaper than indexing
        self._received = torch.zeros(layers, placement.num_local, dtype=torch.int64, device=device)
        self._slots = list(self._received.unbind(0))
        self._received_host = torch.zeros(layers, placement.num_local, dtype=torch.int64)
        self._slots_host = list(self._received_host.unbind(0))
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._fused = fused.supported(self._counts)
        self._experts = [row[:-1] for row in self._rows]
        self._chosen: list[list[Tensor]] = [[] for _ in range(layers)]  # ids that wait for their one kernel
        self._no_ids = torch.zeros(0, dtype=torch.int64, device=device)
        self._no_rows = torch.zeros(placement.num_local, dtype=torch.int32, device=device)
        self._pairs = torch.zeros(layers if by_ids else 0, experts, experts, dtype=torch.int64, device=device)
        self._on_host = False  # some dispatcher counted there
        self._passes = self._windows = 0
        self._begin = time.time()
        self.recording = True

    # --- counting, in every layer of a pass ---------------------------------------------------------

    def begin_pass(self, batch: Batch) -> None:
        """Before a forward pass of ``batch``."""
        if self.passes is not None and self.recording:
            self.passes.begin(batch)

    def selected(self, layer: int, ids_SK: Tensor, slots_SK: Tensor) -> None:
        """One layer's logical ids and slots; -1 (padding) is not counted."""
        if self._by_ids:
            if self._fused:
                self._chosen[layer].append(ids_SK)
            elif self._cpu:
                self._rows[layer].index_put_((ids_SK,), self._one, accumulate=True)
            else:  # where index_put_ would sort
                flat = (ids_SK + (ids_SK < 0) * self._counts.shape[1]).flatten()
                self._rows[layer].scatter_add_(0, flat, self._one.expand(len(flat)))
            if self._samples_pairs:
                self._count_pairs(layer, ids_SK)
        if self.passes is not None and self.recording:
            self.passes.selected(layer, slots_SK)

    def received(self, layer: int, counts_e: Tensor) -> None:
        """Rows that each slot of this rank got, on the host or on the device; follows ``selected``."""
        on_host = counts_e.device.type == "cpu"
        if on_host:
            self._on_host = True
            self._slots_host[layer].add_(counts_e)
        if self._fused:
            ids = self._chosen[layer].pop(0) if self._chosen[layer] else self._no_ids
            fused.count(ids, self._experts[layer], self._no_rows if on_host else counts_e, self._slots[layer])
        elif not on_host:
            self._slots[layer].add_(counts_e)

    @property
    def _samples_pairs(self) -> bool:
        return self._passes == 0 and self.recording and self._windows % self._pairs_every == 0

    def _count_pairs(self, layer: int, ids_SK: Tensor) -> None:
        chosen = torch.zeros(len(ids_SK), self._counts.shape[1], device=ids_SK.device)
        chosen.scatter_(1, ids_SK.long() % chosen.shape[1], 1.0)  # -1 goes to the last column, which is cut off
        self._pairs[layer] += (chosen[:, :-1].T @ chosen[:, :-1]).long()

    # --- windows, between passes --------------------------------------------------------------------

    def end_of_pass(self) -> None:
        """Called by every rank after every forward."""
        if not self.recording:
            return
        self._passes += 1
        if self.passes is not None:
            self.passes.end(self._received_now() if self._counting else None)
        if self._passes >= self.window:
            self._close_window()

    def start(self) -> None:
        """Counts from now on."""
        if not self.recording:
            self._clear()
            self.recording = True

    def stop(self) -> None:
        """Closes the window and counts no further, until ``start``. All ranks at the same pass."""
        self.flush()
        self.recording = False

    def flush(self) -> None:
        """Closes the window now; when it returns, all windows are summed and rank 0's file holds them.

        Raises:
            RuntimeError: the sum over ranks failed.
        """
        if self._passes:
            self._close_window()
        pairs = self._pairs.clone()
        pairs.diagonal(dim1=1, dim2=2).zero_()
        self.history.flush(pairs.cpu() if self._by_ids else None)

    def dump(self, since: float = 0.0) -> str:
        """``flush``, and files in SGLang's format; what was written.

        Args:
            since: Unix seconds; windows that ended before are not in the dump. Single passes are dumped once anyway.
        """
        self.flush()
        if self.passes is not None:
            return self.passes.dump(self.placement.phy2log_LP)
        return self.history.dump(since)

    def placement_changes(self) -> None:
        """Before maps change: a window has one placement. All ranks at the same pass."""
        if self._passes:
            self._close_window()

    def _close_window(self) -> None:
        """Nothing waits here: copies are queued on the device, and summed over ranks by another thread."""
        now = time.time()
        counts = self._counts[:, :-1] if self._by_ids else None
        received = self._received_now() if self._counting else None
        self.history.add(Window(counts, received, self._begin, now, self._passes, self.placement.phy2log_LP.copy()))
        self._windows += 1
        self._clear()

    def _received_now(self) -> Tensor:
        if self._cpu or not self._on_host:
            return self._received_host if self._cpu else self._received
        host = self._received_host.pin_memory()  # a copy, which the device takes without the host waiting for its steps
        return host.to(self._received.device, non_blocking=True) + self._received

    def _clear(self) -> None:
        for counted in (self._counts, self._received, self._received_host):
            counted.zero_()
        self._passes, self._begin = 0, time.time()
