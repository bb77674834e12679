"""Whether a run leaves processes behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Fails if processes of this one's that were started inside are there at the end.

    Others are of earlier tests in the same pytest worker: a forkserver, a resource tracker.
    """
    before = set(psutil.Process().children(recursive=True))
    yield
    after = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in after if process.status() != psutil.STATUS_ZOMBIE]
