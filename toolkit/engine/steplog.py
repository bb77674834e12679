"""StepLog: one row for every forward pass of a DP rank, in ``steps/rank-<R>.arrows`` of the run folder.

The columns are ``StepRecord``. How rows reach the disk is ``rowlog.py``'s affair; a gap of lost rows shows in
``step``. Knows no tensors. Used by worker.py on the leader of each DP rank.
"""

from __future__ import annotations

from pathlib import Path

from toolkit.engine.core import Batch
from toolkit.engine.rowlog import MAX_QUEUED, RowLog
from toolkit.engine.scheduler import Scheduler
from toolkit.records.steps import StepRecord


class StepLog(RowLog[StepRecord]):
    """Rows of one DP rank.

    Args:
        path: file to write; its folder is made.
        dp_rank: the rank whose steps these are.
        page_size: tokens a KV block.
        max_queued: rows held in memory at most.
    """

    def __init__(self, path: Path, dp_rank: int, page_size: int, max_queued: int = MAX_QUEUED) -> None:
        self.dp_rank, self.page_size = dp_rank, page_size
        self._preemptions = 0
        super().__init__(path, StepRecord, max_queued)

    def add(self, step: int, begin: float, duration_s: float, batch: Batch, scheduler: Scheduler) -> None:
        """Files one step: ``begin`` in Unix seconds; the batch that ran; the scheduler as the step left it."""
        pool, preemptions = scheduler.tables, scheduler.stats.preemptions
        decode = len(batch.decode)
        tokens = batch.num_tokens
        self.append(
            StepRecord(
                step, begin, duration_s, self.dp_rank, tokens, decode, tokens - decode, scheduler.num_running,
                scheduler.num_waiting, (pool.num_blocks - pool.num_free) * self.page_size,
                pool.num_blocks * self.page_size, preemptions - self._preemptions,
            )
        )  # fmt: skip
        self._preemptions = preemptions
