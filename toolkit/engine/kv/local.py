"""LocalTransfer: reads between processes of one Linux host, through shared memory. The reference.

A rank's cache lies in a memfd, which peers of the same user open through /proc: nothing is left on disk, however a
process ends. A thread copies; ``released`` is a datagram on an abstract socket. What was mapped stays readable when
its owner dies, so a read fails only when it comes too late to map it. Read next: ``nixl.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.kv.transfer import Read, ReadState

MAX_DATAGRAM = 4096


class Endpoint(msgspec.Struct, frozen=True):
    """What a peer needs: ``files`` are descriptors of process ``pid`` and their sizes; ``regions`` (file, offset)."""

    name: str
    pid: int
    files: list[tuple[int, int]]
    regions: list[tuple[int, int]]


class LocalRead:
    """A read in flight."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.error, self.ended = num_bytes, "", 0.0
        self.stop = Event()
        self.future: Future[None]


class LocalTransfer:
    """See ``transfer.KVTransfer``.

    Raises:
        ValueError: this system has no memfd.
    """

    def __init__(self, name: str) -> None:
        if not hasattr(os, "memfd_create"):
            raise ValueError("deploy.disaggregation_transfer_backend=local needs Linux (memfd): use nixl")
        self._name = f"wideep-kv-{name}-{secrets.token_hex(8)}"
        self._files: list[tuple[int, int, int]] = []  # descriptor, first address, bytes
        self._maps: list[mmap.mmap] = []
        self._addresses = np.empty(0, np.int64)
        self._peers: dict[bytes, str] = {}
        self._peer_addresses: dict[str, NDArray[np.int64]] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="kv-read")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{self._name}")

    def allocate(self, num_bytes: int, device: str) -> Tensor:
        assert device == "cpu", f"local shares host memory, not {device}'s"
        file = os.memfd_create(self._name)
        os.ftruncate(file, max(num_bytes, 1))
        mapped = self._map(file, max(num_bytes, 1))
        memory = torch.frombuffer(mapped, dtype=torch.uint8)[:num_bytes]
        self._files.append((file, memory.data_ptr(), num_bytes))
        return memory

    def register(self, regions: Sequence[Tensor]) -> bytes:
        self._addresses = np.array([region.data_ptr() for region in regions], np.int64)
        places = [self._place(region) for region in regions]
        return msgspec.msgpack.encode(
            Endpoint(self._name, os.getpid(), [(file, size) for file, _, size in self._files], places)
        )

    def connect(self, endpoint: bytes) -> str:
        if endpoint in self._peers:
            return self._peers[endpoint]
        peer = msgspec.msgpack.decode(endpoint, type=Endpoint)
        bases = []
        for descriptor, size in peer.files:
            path = Path(f"/proc/{peer.pid}/fd/{descriptor}")
            try:
                if peer.name not in str(path.readlink()):
                    raise ValueError(f"{peer.name} is not process {peer.pid} any more")
                file = os.open(path, os.O_RDWR)
            except OSError as error:
                raise ValueError(f"the memory of {peer.name} cannot be opened: {error}") from None
            try:
                bases.append(_address(self._map(file, max(size, 1))))
            finally:
                os.close(file)
        self._peer_addresses[peer.name] = np.array([bases[file] + at for file, at in peer.regions], np.int64)
        self._peers[endpoint] = peer.name
        return peer.name

    def start_read(self, peer: str, pieces: NDArray[np.int64]) -> Read:
        read = LocalRead(int(pieces[:, 4].sum()))
        to = self._addresses[pieces[:, 0]] + pieces[:, 1]
        source = self._peer_addresses[peer][pieces[:, 2]] + pieces[:, 3]
        read.future = self._threads.submit(_copy, np.stack([to, source, pieces[:, 4]], axis=1), read)
        return read

    def poll(self, read: Read) -> ReadState:
        assert isinstance(read, LocalRead)
        if not read.future.done():
            return "running"
        if read.stop.is_set():
            read.error = "cancelled"
            return "failed"
        return "done"

    def cancel(self, read: Read) -> None:
        assert isinstance(read, LocalRead)
        read.stop.set()
        with contextlib.suppress(Exception):
            read.future.result()

    def notify(self, peer: str, tag: str) -> None:
        with contextlib.suppress(OSError):  # it is gone, and what it kept with it
            self._socket.sendto(tag.encode(), f"\0{peer}")

    def released(self) -> list[str]:
        tags = []
        with contextlib.suppress(BlockingIOError):
            while True:
                tags.append(self._socket.recv(MAX_DATAGRAM).decode(errors="replace"))
        return tags

    def attend(self, active: bool) -> None:
        """The reader's thread does it all."""

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._socket.close()

    def _map(self, file: int, size: int) -> mmap.mmap:
        mapped = mmap.mmap(file, size)
        self._maps.append(mapped)  # kept: tensors and addresses point into it
        return mapped

    def _place(self, region: Tensor) -> tuple[int, int]:
        """(file, offset) of a region."""
        at = region.data_ptr()
        for index, (_, base, size) in enumerate(self._files):
            if base <= at and at + region.nbytes <= base + size:
                return index, at - base
        raise AssertionError("a region is not in memory that `allocate` gave")


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def _copy(spans: NDArray[np.int64], read: LocalRead) -> None:
    """Copies (to, from, bytes) one after the other. memmove gives the interpreter free meanwhile."""
    for to, source, size in spans.tolist():
        if read.stop.is_set():
            break
        ctypes.memmove(to, source, size)
    read.ended = time.monotonic()
