"""StepLog: one row for every forward pass of a DP rank, in ``steps/rank-<R>.arrows`` of the run folder.

Owns how rows get from the step to the disk: the step appends to a bounded queue (microseconds), a thread writes what
has gathered every ``FLUSH_S``. A disk that hangs costs the oldest rows, never a step and never memory; the gap shows in
``step`` and is logged. The file is an Arrow stream, so what was written before a crash stays readable.
The columns are ``records.StepRecord``. Knows no tensors. Used by worker.py on the leader of each DP rank.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path

from toolkit.engine.core import Batch
from toolkit.engine.scheduler import Scheduler
from toolkit.records import StepRecord, open_steps

log = logging.getLogger(__name__)

FLUSH_S = 2.0  # how much a crash may lose
MAX_QUEUED = 1 << 16  # rows kept when the disk does not take them: about 15 MB


class StepLog:
    """Rows of one DP rank.

    Args:
        path: file to write; its folder is made.
        dp_rank: the rank whose steps these are.
        page_size: tokens a KV block.
        max_queued: rows held in memory at most.
    """

    def __init__(self, path: Path, dp_rank: int, page_size: int, max_queued: int = MAX_QUEUED) -> None:
        self.dp_rank, self.page_size, self._path = dp_rank, page_size, path
        self._queue: deque[StepRecord] = deque(maxlen=max_queued)  # append and popleft are atomic
        self._added = self._taken = self._dropped = 0
        self._preemptions = 0
        self._wanted, self._flushed = threading.Event(), threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="step-log", daemon=True)
        self._thread.start()

    def add(self, step: int, begin: float, duration_s: float, batch: Batch, scheduler: Scheduler) -> None:
        """Files one step: ``begin`` in Unix seconds; the batch that ran; the scheduler as the step left it."""
        pool, preemptions = scheduler.tables, scheduler.stats.preemptions
        decode = len(batch.decode)
        tokens = batch.num_tokens
        self._queue.append(
            StepRecord(
                step, begin, duration_s, self.dp_rank, tokens, decode, tokens - decode, scheduler.num_running,
                scheduler.num_waiting, (pool.num_blocks - pool.num_free) * self.page_size,
                pool.num_blocks * self.page_size, preemptions - self._preemptions,
            )
        )  # fmt: skip
        self._preemptions = preemptions
        self._added += 1

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Waits until what was added is in the file. False when the disk did not take it in ``timeout_s``."""
        self._flushed.clear()
        self._wanted.set()
        return self._flushed.wait(timeout_s)

    def close(self) -> None:
        self._closing = True
        self._wanted.set()
        self._thread.join(timeout=5.0)

    def _write_all(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_steps(self._path) as write:
                while not self._closing:
                    asked = self._wanted.wait(FLUSH_S)
                    self._wanted.clear()
                    rows = self._take()
                    if rows:
                        write(rows)
                    if asked:
                        self._flushed.set()
                if rows := self._take():
                    write(rows)
        except Exception:  # the measurement must not cost the service
            log.exception("step log: %s is not written any more", self._path)

    def _take(self) -> list[StepRecord]:
        added = self._added
        rows = [self._queue.popleft() for _ in range(len(self._queue))]
        self._taken += len(rows)
        dropped = max(added - self._taken, 0)  # rows added while this runs may be counted early, never late
        if dropped > self._dropped:
            log.warning("step log: %d rows lost, the disk is slower than the steps", dropped - self._dropped)
            self._dropped = dropped
        return rows
