"""Peers: the ranks of a worker end together. When one is gone, each of the others is gone soon after.

A rank that waits for a dead one mostly gets an error, but not always: gloo wakes those whose messages are queued, not
one whose message was half sent or half received (pair.cc, ``signalException``: neither the operation that is read nor
those that are written), and kernels of NCCL or DeepEP wait on the device. So ranks watch each other in a ring: each
expects one message from the rank before it, which comes when that one leaves in order, or has heard that another is
gone; or never, and the connection breaks. A queued message, which gloo does wake. The news goes round at once; a rank
that has not ended by itself after ``GRACE_S``, with an error that says more, is ended from outside Python, with the
stacks of its threads.
A rank that hangs but lives breaks nothing: that is the launcher's watchdog's (``launch/stall.py``). Used by worker.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import threading
import time

import torch
from torch import Tensor

from toolkit.engine.parallel import Comm

log = logging.getLogger(__name__)

GRACE_S = 5.0
QUIET_S = 1.0  # when all are told to end, each sees others go: not worth a line
IN_ORDER = -1  # what a rank says that leaves, in place of the rank that is gone


class Peers:
    """The watch of one rank, by a thread. All ranks of ``comm`` (host data) make theirs; ``leave`` at the end."""

    def __init__(self, comm: Comm, grace_s: float = GRACE_S) -> None:
        self._comm, self._grace_s = comm, grace_s
        self._before, self._after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        self._heard, self._said = torch.full((1,), IN_ORDER), list[tuple[Tensor, object]]()
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        if comm.size > 1:
            self._expected = comm.exchange([], [(self._heard, self._before)])
            self._thread.start()

    def leave(self) -> None:
        """This rank ends in order, as all do now; waits a moment for the one before it."""
        if self._comm.size > 1:
            self._say(IN_ORDER)
            self._thread.join(self._grace_s)

    def _listen(self) -> None:
        try:
            for work in self._expected:
                work.wait()
            gone = int(self._heard)
        except RuntimeError:  # the connection broke
            gone = self._before
        if gone == IN_ORDER:
            return
        faulthandler.dump_traceback_later(self._grace_s, exit=True, file=sys.stderr)
        self._say(gone)
        time.sleep(min(QUIET_S, self._grace_s / 2))
        log.error("rank %d is gone: this one ends, too, in %g s at most", self._comm.ranks[gone], self._grace_s)

    def _say(self, what: int) -> None:
        """Small, and expected: it is written at once, so nobody waits for it."""
        word = torch.tensor([what])
        with contextlib.suppress(RuntimeError):  # the one after is gone already, and its own successor says so
            self._said.append((word, self._comm.exchange([(word, self._after)], [])))
