"""Recorder: how many tokens the gate sent to each logical expert, in windows of forward passes.

Every rank counts the rows it owns. At a window's end, on the same step everywhere, the counts are summed over all
ranks. Memory stays bounded on a run of any length: when ``MAX_WINDOWS`` are full, neighbours are merged and windows
become twice as long. Rank 0 keeps the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.eplb.placement import Placement
from toolkit.records import ExpertCounts, write_experts

MAX_WINDOWS = 2048
FLUSH_S = 10.0  # how much a crash may lose


class Recorder:
    """Counts of one rank.

    Args:
        layer_ids: the model's index of each MoE layer.
        window: forward passes a window.
        sum_over_ranks: adds a tensor up over all ranks in place (a collective: every rank calls it alike).
        path: file kept on this rank; None on all ranks but one.
    """

    def __init__(
        self,
        layer_ids: tuple[int, ...],
        placement: Placement,
        window: int,
        sum_over_ranks: Callable[[Tensor], object],
        path: Path | None,
        device: str,
    ) -> None:
        self.layer_ids, self.placement, self.window, self.path = layer_ids, placement, window, path
        self._sum = sum_over_ranks
        self._counts = torch.zeros(len(layer_ids), placement.num_experts, dtype=torch.int64, device=device)
        self._windows: list[np.ndarray] = []
        self._times: list[tuple[float, float]] = []
        self._placements = [(time.time(), placement.phy2log.cpu().numpy().astype(np.int32))]
        self._passes = 0
        self._begin = self._written = time.time()
        self.last_balancedness = float("nan")
        self.recording = True

    def start(self) -> None:
        """Counts from now on."""
        if not self.recording:
            self.recording, self._begin = True, time.time()

    def stop(self) -> None:
        """Closes the window (a collective) and counts no further, until ``start``."""
        self.end_of_pass(flush=True)
        self.recording = False

    def record(self, layer: int, ids_SK: Tensor) -> None:
        """Adds one layer's logical ids; -1 (padding) is not counted."""
        if not self.recording:
            return
        flat = ids_SK.flatten()
        self._counts[layer].scatter_add_(0, flat.clamp_min(0), (flat >= 0).long())

    def end_of_pass(self, flush: bool = False) -> None:
        """Called by every rank after every forward, and with ``flush`` when all agreed to close the window now."""
        self._passes += self.recording and not flush
        if self._passes and (flush or self._passes >= self.window):
            self._close_window()
        if flush:
            self.write()

    def _close_window(self) -> None:
        self._sum(self._counts)
        now = time.time()
        if self.path is not None:
            counts = self._counts.cpu().numpy().copy()
            self._windows.append(counts)
            self._times.append((self._begin, now))
            self.last_balancedness = self._balancedness(counts)
            if len(self._windows) >= MAX_WINDOWS:
                self._merge_neighbours()
            if now - self._written > FLUSH_S:
                self.write()
        self._counts.zero_()
        self._passes, self._begin = 0, now

    def _merge_neighbours(self) -> None:
        self._windows = [a + b for a, b in zip(self._windows[::2], self._windows[1::2])]
        self._times = [(a[0], b[1]) for a, b in zip(self._times[::2], self._times[1::2])]

    def _balancedness(self, counts_LE: np.ndarray) -> float:
        """Mean over layers of mean / max over EP ranks of their load (SGLang's definition)."""
        phy2log = self.placement.phy2log.cpu().numpy()
        replicas = np.stack([np.bincount(row, minlength=self.placement.num_experts) for row in phy2log])
        per_slot = np.take_along_axis(counts_LE / replicas, phy2log, axis=1)
        per_rank = per_slot.reshape(len(phy2log), self.placement.ep_size, -1).sum(-1)
        return float(((per_rank.mean(1) + 1e-5) / (per_rank.max(1) + 1e-5)).mean())

    def write(self) -> None:
        """Writes the file, if it is this rank's."""
        if self.path is None:
            return
        shape = (0, len(self.layer_ids), self.placement.num_experts)
        experts = ExpertCounts(
            counts=np.stack(self._windows) if self._windows else np.zeros(shape, np.int64),
            times=np.array(self._times, np.float64).reshape(-1, 2),
            placement=np.stack([phy2log for _, phy2log in self._placements]),
            placement_times=np.array([begin for begin, _ in self._placements]),
            layer_ids=np.array(self.layer_ids, np.int32),
            ep_size=self.placement.ep_size,
        )
        write_experts(self.path, experts)
        self._written = time.time()
