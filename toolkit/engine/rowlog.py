"""RowLog: rows to a file of the run folder, without holding up whoever adds them.

``add`` appends to a bounded queue (microseconds), a thread writes what has gathered every ``FLUSH_S``. A disk that
hangs costs the oldest rows, never a step and never memory; the loss is logged. The file is an Arrow stream
(``streams.open_rows``), so what was written before a crash stays readable. Used by ``steplog.py``, ``disagg/log.py``.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path
from typing import Any, Generic, TypeVar

from toolkit.records.streams import open_rows

log = logging.getLogger(__name__)

FLUSH_S = 2.0  # how much a crash may lose
MAX_QUEUED = 1 << 16  # rows kept when the disk does not take them: about 15 MB

R = TypeVar("R", bound=tuple[Any, ...])


class RowLog(Generic[R]):
    """Rows of one kind.

    Args:
        path: file to write; its folder is made.
        record: the rows' class.
        max_queued: rows held in memory at most.
    """

    def __init__(self, path: Path, record: type[R], max_queued: int = MAX_QUEUED) -> None:
        self._path, self._record = path, record
        self._queue: deque[R] = deque(maxlen=max_queued)  # append and popleft are atomic
        self._added = self._taken = self._dropped = 0
        self._wanted, self._flushed = threading.Event(), threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="row-log", daemon=True)
        self._thread.start()

    def append(self, row: R) -> None:
        self._queue.append(row)
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
            with open_rows(self._path, self._record) as write:
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
            log.exception("%s is not written any more", self._path)

    def _take(self) -> list[R]:
        added = self._added
        rows = [self._queue.popleft() for _ in range(len(self._queue))]
        self._taken += len(rows)
        dropped = max(added - self._taken, 0)  # rows added while this runs may be counted early, never late
        if dropped > self._dropped:
            log.warning("%s: %d rows lost, the disk is slower than they come", self._path.name, dropped - self._dropped)
            self._dropped = dropped
        return rows
