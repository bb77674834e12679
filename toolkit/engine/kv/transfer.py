"""KVTransfer: how a decode rank reads KV blocks out of a prefill rank's cache; the table of ways to do it.

Pull: the reader knows both block tables and fetches; the other side keeps its blocks until the reader says that it
has them. A transfer moves pieces (``layout.py``) between registered regions of memory. It knows neither requests nor
schedulers, and nothing of who reads what. Contract, run over every way (tests/contract/test_transfers.py): the bytes
arrive equal; nothing is written after ``cancel``; a peer that dies or stands still ends in ``failed`` or in the
caller's own deadline, never in an exception.
Read next: ``local.py``, the reference; ``strategy.py``, which way a copy between two kinds of storage takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolkit.registry import Registry

ReadState = Literal["running", "done", "failed"]


class Read(Protocol):
    """One read in flight. ``error`` says why it failed; ``ended`` when it was over, monotonic seconds, 0: not yet."""

    num_bytes: int
    error: str
    ended: float


class KVTransfer(Protocol):
    """One rank's end. Not for several threads."""

    def allocate(self, num_bytes: int, device: str) -> Tensor:
        """Memory of bytes, zeroed, that ``register`` can offer to peers."""
        ...

    def register(self, regions: Sequence[Tensor]) -> bytes:
        """Offers ``regions`` to peers, once. Returns what a peer must be given to ``connect``."""
        ...

    def connect(self, endpoint: bytes) -> str:
        """Makes the peer of that endpoint readable; its name. Again: the same name, at no cost. ``ValueError``."""
        ...

    def start_read(self, peer: str, pieces: NDArray[np.int64]) -> Read:
        """Starts to copy the peer's ``pieces`` (``layout.PIECE``) into the own regions. Does not wait."""
        ...

    def poll(self, read: Read) -> ReadState: ...

    def cancel(self, read: Read) -> None:
        """Ends a read, whatever it takes; when this returns nothing more is written into the own regions."""
        ...

    def notify(self, peer: str, tag: str) -> None:
        """Tells the peer that ``tag`` was read. A peer that is gone is no error."""
        ...

    def released(self) -> list[str]:
        """Tags that readers have reported since the last call."""
        ...

    def attend(self, active: bool) -> None:
        """Whether reads go on, here or by a peer, that this process must keep moving even while it computes."""
        ...

    def close(self) -> None: ...


TransferFactory = Callable[[str], KVTransfer]  # (name, unique among all ranks of the deployment)

TRANSFERS: Registry[TransferFactory] = Registry("deploy.disaggregation_transfer_backend")


@TRANSFERS.register("local")
def _local(name: str) -> KVTransfer:
    from toolkit.engine.kv.local import LocalTransfer

    return LocalTransfer(name)


@TRANSFERS.register("nixl")
def _nixl(name: str) -> KVTransfer:
    from toolkit.engine.kv.nixl import NixlTransfer

    return NixlTransfer(name)
