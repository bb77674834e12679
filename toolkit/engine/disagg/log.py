"""TransferLog: one row for every request whose KV came from another worker, in ``transfers/`` of the run folder.

The columns are ``TransferRecord``. A row is complete with the first token that is decoded here; of a request
that never gets there, with its end. Times of the other side come with the ticket as durations, so that no two clocks
are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.engine.rowlog import RowLog
from toolkit.records.steps import TransferRecord, transfers_path

if TYPE_CHECKING:
    from toolkit.engine.disagg.decode import Arrival

MAX_OPEN = 1 << 16  # joined requests whose first decoded token is still to come


class TransferLog:
    """Rows of one DP rank.

    Args:
        rows: None: nothing is written.
    """

    def __init__(self, rows: RowLog[TransferRecord] | None, worker: str, dp_rank: int) -> None:
        self._rows, self._worker, self._dp_rank = rows, worker, dp_rank
        self._open: dict[str, tuple[TransferRecord, float]] = {}

    @classmethod
    def of(cls, folder: Path | None, worker: str, rank: int, dp_rank: int) -> TransferLog:
        """``folder``: the run's; None: nothing is written."""
        rows = None if folder is None else RowLog(transfers_path(folder, worker, rank), TransferRecord)
        return cls(rows, worker, dp_rank)

    def joined(self, arrival: Arrival) -> None:
        """The request has its KV and runs from now on."""
        ticket = arrival.ticket
        if self._rows is None or ticket is None:
            return
        now = time.monotonic()
        row = TransferRecord(
            request_id=arrival.request.rid.rpartition("@")[0],
            t_join=time.time(),
            worker=self._worker,
            dp_rank=self._dp_rank,
            tokens=ticket.num_tokens,
            bytes=arrival.num_bytes,
            prefill_queue_s=ticket.queue_s,
            prefill_s=ticket.prefill_s,
            place_s=max(arrival.placed - arrival.came, 0.0),
            wait_s=max(min((begin for begin, _ in arrival.spans), default=now) - arrival.known, 0.0),
            transfer_s=covered(arrival.spans),
            hidden_s=covered((begin, min(end, arrival.known)) for begin, end in arrival.spans),
            join_s=max(now - max(arrival.ended, arrival.known), 0.0),
            first_decode_s=math.nan,
        )
        self._open[arrival.request.rid] = (row, now)
        if len(self._open) > MAX_OPEN:
            self.decoded(next(iter(self._open)), ended=True)

    def decoded(self, rid: str, ended: bool = False) -> None:
        """A token of the request came out; ``ended``: none will."""
        found = self._open.pop(rid, None)
        if found is not None and self._rows is not None:
            row, joined = found
            self._rows.append(row if ended else row._replace(first_decode_s=time.monotonic() - joined))

    def flush(self) -> None:
        if self._rows is not None:
            self._rows.flush()

    def close(self) -> None:
        for rid in list(self._open):
            self.decoded(rid, ended=True)
        if self._rows is not None:
            self._rows.close()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of ``spans`` (begin, end) goes on."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
