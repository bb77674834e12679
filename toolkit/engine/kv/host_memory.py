"""HostMemory: a cache in a memfd, which peers of the same user open through /proc; a thread copies.

Nothing is left on disk, however a process ends. What was mapped stays readable when its owner dies, so that a read
under way ends well. Read next: ``local.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from toolkit.engine.kv.local import Endpoint


class HostCopy:
    """See ``local.Copy``."""

    def __init__(self) -> None:
        self.ended, self.stopped = 0.0, False
        self.asked = Event()
        self.future: Future[None]

    def done(self) -> bool:
        return self.future.done()

    def stop(self) -> None:
        self.asked.set()
        with contextlib.suppress(Exception):
            self.future.result()

    def run(self, spans: NDArray[np.int64]) -> None:
        """Copies one span after the other. memmove gives the interpreter free meanwhile."""
        for to, source, size in spans.tolist():
            if self.asked.is_set():
                self.stopped = True
                break
            ctypes.memmove(to, source, size)
        self.ended = time.monotonic()


class HostMemory:
    """See ``local.Memory``. ``ValueError``: this system has no memfd."""

    def __init__(self, name: str) -> None:
        if not hasattr(os, "memfd_create"):
            raise ValueError("deploy.disaggregation_transfer_backend=local needs Linux (memfd): use nixl")
        self._name = name
        self._files: dict[int, int] = {}  # address -> descriptor
        self._maps: dict[int, mmap.mmap] = {}  # kept: tensors and addresses point into them
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-read")

    def allocate(self, num_bytes: int) -> Tensor:
        file = os.memfd_create(self._name)
        os.ftruncate(file, max(num_bytes, 1))
        at = self._map(file, max(num_bytes, 1))
        self._files[at] = file
        return torch.frombuffer(self._maps[at], dtype=torch.uint8)[:num_bytes]

    def handle(self, address: int) -> bytes:
        return str(self._files[address]).encode()

    def open(self, peer: Endpoint) -> list[int]:
        return [self._open(peer, int(handle), size) for handle, size in peer.handles]

    def close(self, addresses: list[int]) -> None:
        for at in addresses:  # behind copies under way, which read there
            self._thread.submit(self._maps.pop(at).close)

    def copy(self, spans: NDArray[np.int64]) -> HostCopy:
        copy = HostCopy()
        copy.future = self._thread.submit(copy.run, spans)
        return copy

    def shut_down(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _open(self, peer: Endpoint, descriptor: int, size: int) -> int:
        path = Path(f"/proc/{peer.pid}/fd/{descriptor}")
        try:
            if peer.name not in str(path.readlink()):
                raise ValueError(f"{peer.name} is not process {peer.pid} any more")
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise ValueError(f"the memory of {peer.name} cannot be opened: {error}") from None
        try:
            return self._map(file, max(size, 1))
        finally:
            os.close(file)

    def _map(self, file: int, size: int) -> int:
        mapped = mmap.mmap(file, size)
        at = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._maps[at] = mapped
        return at
