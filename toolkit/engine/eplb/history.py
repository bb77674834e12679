"""History: the recorder's windows, summed over all ranks beside the steps; on rank 0 also kept, written and passed on.

One thread a rank, with a process group of its own, sums the windows in the order in which they come, which is the same
on every rank; so a step never waits for a sum. Memory stays bounded on a run of any length: when ``MAX_WINDOWS``
are full, neighbours are merged. A worker that is started anew goes on with the file that the process before left.
Knows nothing of how counts come about. Read next: ``windows.py``; ``manager.py``, which listens.
L: MoE layers, E: logical experts, P: slots, e: slots of this rank.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.eplb.windows import Ints, Summed, Window, balancedness, halved
from toolkit.engine.parallel import Comm
from toolkit.records import EXPERT_DUMPS
from toolkit.records.experts import ExpertCounts, read_experts, write_experts

log = logging.getLogger(__name__)

MAX_WINDOWS = 2048
WRITE_S = 10.0  # how much a crash may lose
WRITE_SHARE = 0.05  # of the thread's time, at most: a long history takes longer to write and is written less often
MAX_PLACEMENTS = 512
MAX_ASKED = 64  # moments at which somebody asked, a run between two of them: windows of both are not merged
DUMP_WINDOWS = 16  # of a dump in SGLang's format, whose readers sum them up
FLUSH_TIMEOUT_S = 60.0


@dataclass
class _Flush:
    done: threading.Event
    pairs: Tensor | None


class History:
    """Windows of one rank on their way to all.

    Args:
        layer_ids: the model's index of each MoE layer.
        comm: all ranks, used by nothing else.
        ep_rank, ep_size: where this rank's slots are among all.
        placement_LP: in force at the start.
        path: file kept on this rank; None on all ranks but the first.

    Attributes:
        listen: called on the first rank, in the thread, with every summed window.
        last_balancedness: of the rows that ranks received in the last window; on the first rank only.
    """

    def __init__(
        self, layer_ids: tuple[int, ...], experts: int, comm: Comm, ep_rank: int, ep_size: int, placement_LP: Ints,
        path: Path | None,
    ) -> None:  # fmt: skip
        self._layer_ids, self._experts, self._comm, self._path = layer_ids, experts, comm, path
        self._ep_rank, self._ep_size, self._slots = ep_rank, ep_size, placement_LP.shape[1]
        self._windows: list[Summed] = []
        self._placements: list[tuple[float, NDArray[np.int32]]] = []
        self._pairs: np.ndarray | None = None
        self._pairs_before: np.ndarray | int = 0
        self._asked: deque[float] = deque(maxlen=MAX_ASKED)
        if path is not None and path.exists():
            self._go_on(path, placement_LP.shape)
        self._placements.append((time.time(), placement_LP.astype(np.int32)))
        self._written = time.monotonic()
        self._write_took = 0.0
        self._failure = ""
        self.listen: Callable[[Summed], None] = lambda window: None
        self.last_balancedness = float("nan")
        self._jobs: queue.SimpleQueue[tuple[Window, object] | _Flush] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="expert-history", daemon=True).start()

    def _go_on(self, path: Path, shape_LP: tuple[int, ...]) -> None:
        """Takes over what the process before left. What does not fit is put aside, not lost."""
        try:
            found = read_experts(path)
            shapes = (found.counts.shape[1:], found.placement.shape[1:], found.ep_size)
            if shapes != ((len(self._layer_ids), self._experts), shape_LP, self._ep_size) or found.slot_counts is None:
                raise ValueError(f"it counts other layers, experts, slots or ranks: {shapes}")
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            log.warning("%s is not gone on with (%s): it is %s now", path, error, aside.name)
            return
        whole = zip(found.counts, found.slot_counts, found.times.tolist(), strict=True)
        self._windows = [Summed(counts, slots, begin, end, 0) for counts, slots, (begin, end) in whole]
        self._placements = list(zip(found.placement_times.tolist(), found.placement, strict=True))
        if found.pairs is not None:
            self._pairs = self._pairs_before = found.pairs
        log.info("%s: going on with %d windows of the process before", path, len(self._windows))

    # --- called between steps -----------------------------------------------------------------------

    def add(self, window: Window) -> None:
        """Takes a window. What it counted is copied in device order; its tensors may be cleared at once."""
        copied = [None if t is None else _copy(t) for t in (window.counts, window.received)]
        window.counts, window.received = copied
        self._jobs.put((window, _event(copied)))

    def flush(self, pairs: Tensor | None) -> None:
        """Returns when all windows until now are summed and written. Every rank calls it.

        Args:
            pairs: this rank's count of experts chosen together, [L, E, E], on the host.

        Raises:
            RuntimeError: the sum over ranks failed, or takes longer than a minute.
        """
        asked = _Flush(threading.Event(), pairs)
        self._jobs.put(asked)
        if not asked.done.wait(FLUSH_TIMEOUT_S):
            raise RuntimeError(f"expert counts were not summed over the ranks in {FLUSH_TIMEOUT_S:g} s")
        if self._failure:
            raise RuntimeError(f"expert counts cannot be summed over the ranks: {self._failure}")

    def placement_changed(self, phy2log_LP: Ints, moment: float) -> None:
        """The windows that begin after ``moment`` (Unix seconds) have this placement."""
        self._placements.append((moment, phy2log_LP.astype(np.int32)))
        if len(self._placements) > MAX_PLACEMENTS:
            del self._placements[1]  # the first stays: how it was without rebalancing

    def dump(self, since: float) -> str:
        """Writes SGLang's ``stat`` dump beside the file (on the rank that keeps it); its name.

        Args:
            since: Unix seconds: of the windows that ended later.
        """
        if self._path is None:
            return ""
        from toolkit.engine.eplb.formats import write_dump

        none = Summed(self._none(self._experts), self._none(self._slots), 0.0, 0.0, 0)
        windows = [window for window in self._windows if window.end > since] or [none]
        parts = [part for part in np.array_split(np.arange(len(windows)), DUMP_WINDOWS) if len(part)]
        counts = np.stack([sum(windows[i].counts_LE for i in part) for part in parts])
        rows = np.zeros((len(counts), max(self._layer_ids) + 1, self._experts), np.int64)  # one of every model layer
        rows[:, list(self._layer_ids)] = counts
        path = dump_path(self._path, None)
        write_dump(path, rows, self.last_balancedness)
        return f"{path.parent.name}/{path.name}"

    # --- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if not self._failure:
                    with torch.inference_mode():
                        self._work(job)
            except Exception as error:  # the measurement must not cost the service
                self._failure = f"{type(error).__name__}: {error}"
                log.exception("expert counts are not summed over the ranks any more")
            if isinstance(job, _Flush):
                job.done.set()

    def _work(self, job: tuple[Window, object] | _Flush) -> None:
        if isinstance(job, _Flush):
            if job.pairs is not None:
                self._comm.all_reduce(job.pairs)
                self._pairs = job.pairs.numpy() + self._pairs_before
            if self._windows:
                self._asked.append(self._windows[-1].end)
            self._write()
            return
        window, event = job
        if event is not None:
            event.synchronize()  # type: ignore[attr-defined]
        summed = self._sum(window)
        if self._path is None and self._comm.rank != 0:
            return
        self._windows.append(summed)
        self.last_balancedness = balancedness(summed.slots_LP, self._ep_size)
        if len(self._windows) >= MAX_WINDOWS:
            self._windows = halved(self._windows, set(self._asked))
        self.listen(summed)
        if time.monotonic() - self._written > max(WRITE_S, self._write_took / WRITE_SHARE):
            self._write()

    def _sum(self, window: Window) -> Summed:
        layers, local = len(self._layer_ids), self._slots // self._ep_size
        slots = torch.zeros(layers, self._slots, dtype=torch.int64)
        if window.received is not None:
            slots[:, self._ep_rank * local : (self._ep_rank + 1) * local] = window.received
        both = torch.cat([slots] if window.counts is None else [slots, window.counts], dim=1)
        self._comm.all_reduce(both)
        slots_LP = both[:, : self._slots].numpy()
        counts_LE = both[:, self._slots :].numpy()
        if window.counts is None:
            counts_LE = self._none(self._experts)
            layer = np.arange(layers)[:, None]
            np.add.at(counts_LE, (layer, window.phy2log_LP), slots_LP)
        return Summed(counts_LE, slots_LP, window.begin, window.end, window.passes)

    def _none(self, columns: int) -> Ints:
        return np.zeros((len(self._layer_ids), columns), np.int64)

    def _write(self) -> None:
        if self._path is None:
            return
        begin = time.monotonic()
        windows, placements = self._windows, list(self._placements)
        experts = ExpertCounts(
            counts=np.stack([w.counts_LE for w in windows]) if windows else self._none(self._experts)[None][:0],
            times=np.array([(w.begin, w.end) for w in windows], np.float64).reshape(-1, 2),
            placement=np.stack([phy2log for _, phy2log in placements]),
            placement_times=np.array([moment for moment, _ in placements]),
            layer_ids=np.array(self._layer_ids, np.int32),
            ep_size=self._ep_size,
            pairs=self._pairs,
            slot_counts=np.stack([w.slots_LP for w in windows]) if windows else self._none(self._slots)[None][:0],
        )
        write_experts(self._path, experts)
        self._written = time.monotonic()
        self._write_took = self._written - begin


def dump_path(experts: Path, rank: int | None) -> Path:
    """Where a dump goes, under SGLang's name; ``rank`` where every rank writes one."""
    folder = experts.parent / EXPERT_DUMPS
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if rank is None else f"_{rank}"
    return folder / f"expert_distribution_recorder_{time.time():.3f}{suffix}.pt"


def _copy(tensor: Tensor) -> Tensor:
    """On the host; from a device into pinned memory, without waiting."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _event(copies: list[Tensor | None]) -> object:
    """What says when copies from a device have arrived; None: they have."""
    if not any(copy is not None and copy.is_pinned() for copy in copies):
        return None
    event = torch.cuda.Event()
    event.record()
    return event
