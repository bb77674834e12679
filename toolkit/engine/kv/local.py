"""LocalTransfer: reads between processes of one Linux host that see each other's memory. The reference.

What is shared, and who copies, depends on where the cache lies: ``host_memory.py`` (a memfd, a thread) or
``device_memory.py`` (CUDA IPC, one kernel a read). Here is the rest: who the peers are, what they let go, and that the
memory of one which has ended is given back at once, since a process that comes in its place needs it. ``released`` is
a datagram on an abstract socket. Read next: ``host_memory.py``, ``nixl.py``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.kv.transfer import Read, ReadState

log = logging.getLogger(__name__)

MAX_DATAGRAM = 4096


class Endpoint(msgspec.Struct, frozen=True):
    """What a peer needs: ``handles`` to the memory of process ``pid`` and its sizes; ``regions`` (handle, offset)."""

    name: str
    pid: int
    device: str
    handles: list[tuple[bytes, int]]
    regions: list[tuple[int, int]]


class Copy(Protocol):
    """Copies under way. ``ended``: monotonic seconds, once they are done."""

    ended: float
    stopped: bool

    def done(self) -> bool: ...

    def stop(self) -> None:
        """Returns when nothing more is written; ``stopped`` tells whether something was left out."""
        ...


class Memory(Protocol):
    """One kind of memory that processes of a host can share. A ``ValueError`` says why it cannot be done."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Zeroed bytes."""
        ...

    def handle(self, address: int) -> bytes:
        """What a peer opens the memory with that ``allocate`` gave at ``address``."""
        ...

    def open(self, peer: Endpoint) -> list[int]:
        """The addresses at which the peer's handles are mapped here."""
        ...

    def close(self, addresses: list[int]) -> None:
        """Unmaps them, after copies under way. The peer has ended."""
        ...

    def copy(self, spans: NDArray[np.int64]) -> Copy:
        """Starts copies of (to, from, bytes)."""
        ...

    def shut_down(self) -> None: ...


class LocalRead:
    """A read in flight, or one that failed at its start."""

    def __init__(self, num_bytes: int, copy: Copy | None, error: str = "") -> None:
        self.num_bytes, self.copy, self.error = num_bytes, copy, error
        self.ended = time.monotonic() if copy is None else 0.0


class LocalTransfer:
    """See ``transfer.KVTransfer``."""

    def __init__(self, name: str) -> None:
        self._name = f"wideep-kv-{name}-{secrets.token_hex(8)}"
        self._device = "cpu"
        self._memory: Memory | None = None  # the first allocation decides
        self._allocated: list[tuple[int, int]] = []  # address, bytes
        self._addresses = np.empty(0, np.int64)
        self._lock = threading.Lock()  # of what follows: peers are forgotten by a thread
        self._peers: dict[bytes, str] = {}
        self._mapped: dict[str, list[int]] = {}
        self._peer_addresses: dict[str, NDArray[np.int64]] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{self._name}")
        self._closing = os.eventfd(0)
        self._watches: list[threading.Thread] = []

    def allocate(self, num_bytes: int, device: str) -> Tensor:
        """Raises ``ValueError``: this system does not share such memory."""
        if self._memory is None:
            self._device, self._memory = device, _make_memory(device, self._name)
        assert device == self._device, f"{device} after {self._device}"
        memory = self._memory.allocate(num_bytes)
        self._allocated.append((memory.data_ptr(), num_bytes))
        return memory

    def register(self, regions: Sequence[Tensor]) -> bytes:
        assert self._memory is not None, "no region can be shared before `allocate`"
        self._addresses = np.array([region.data_ptr() for region in regions], np.int64)
        places = [self._place(region) for region in regions]
        used = sorted({number for number, _ in places})  # a cache may have been made anew
        handles = [(self._memory.handle(at), size) for at, size in (self._allocated[i] for i in used)]
        regions_of = [(used.index(number), offset) for number, offset in places]
        return msgspec.msgpack.encode(Endpoint(self._name, os.getpid(), self._device, handles, regions_of))

    def connect(self, endpoint: bytes) -> str:
        with self._lock:
            if endpoint in self._peers:
                return self._peers[endpoint]
        assert self._memory is not None, "nothing can be read before `allocate`"
        peer = msgspec.msgpack.decode(endpoint, type=Endpoint)
        if peer.device.partition(":")[0] != self._device.partition(":")[0]:
            raise ValueError(
                f"the memory of {peer.name} is {peer.device}'s, and of this rank {self._device}'s: use nixl"
            )
        mapped = self._memory.open(peer)
        with self._lock:
            self._mapped[peer.name], self._peers[endpoint] = mapped, peer.name
            self._peer_addresses[peer.name] = np.array([mapped[i] + at for i, at in peer.regions], np.int64)
        watch = threading.Thread(target=self._await_end, args=(endpoint, peer), name="kv-peer", daemon=True)
        self._watches.append(watch)
        watch.start()
        return peer.name

    def start_read(self, peer: str, pieces: NDArray[np.int64]) -> Read:
        assert self._memory is not None
        region, offset, peer_region, peer_offset, size = pieces.T
        num_bytes = int(size.sum())
        with self._lock:  # so that nothing is unmapped between here and the copy's start
            addresses = self._peer_addresses.get(peer)
            if addresses is None:
                return LocalRead(num_bytes, None, f"{peer} has ended")
            spans = np.stack([self._addresses[region] + offset, addresses[peer_region] + peer_offset, size], axis=1)
            return LocalRead(num_bytes, self._memory.copy(spans))

    def poll(self, read: Read) -> ReadState:
        assert isinstance(read, LocalRead)
        if read.copy is None:
            return "failed"
        if not read.copy.done():
            return "running"
        read.ended = read.copy.ended
        if read.copy.stopped:
            read.error = "cancelled"
            return "failed"
        return "done"

    def cancel(self, read: Read) -> None:
        assert isinstance(read, LocalRead)
        if read.copy is not None:
            read.copy.stop()

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
        """The reader does it all."""

    def close(self) -> None:
        os.eventfd_write(self._closing, 1)
        for watch in self._watches:
            watch.join()
        os.close(self._closing)
        if self._memory is not None:
            self._memory.shut_down()
        self._socket.close()

    def _place(self, region: Tensor) -> tuple[int, int]:
        """(number of the allocation, offset) of a region."""
        at = region.data_ptr()
        for number, (base, size) in reversed(list(enumerate(self._allocated))):  # the older may have been freed
            if base <= at and at + region.nbytes <= base + size:
                return number, at - base
        raise AssertionError("a region is not in memory that `allocate` gave")

    def _await_end(self, endpoint: bytes, peer: Endpoint) -> None:
        """Unmaps the peer's memory when it has ended. In a thread of its own, which sleeps until then."""
        try:
            process = os.pidfd_open(peer.pid)
        except ProcessLookupError:
            pass  # it has
        except OSError as error:
            log.info("%s is not watched: %s", peer.name, error)
            return
        else:
            with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
                for descriptor in (process, self._closing):
                    selector.register(descriptor, selectors.EVENT_READ)
                ready = [key.fd for key, _ in selector.select()]
            os.close(process)
            if self._closing in ready:
                return
        log.info("%s has ended", peer.name)
        with self._lock:
            del self._peers[endpoint], self._peer_addresses[peer.name]
            assert self._memory is not None
            self._memory.close(self._mapped.pop(peer.name))


def _make_memory(device: str, name: str) -> Memory:
    if device == "cpu":
        from toolkit.engine.kv.host_memory import HostMemory

        return HostMemory(name)
    from toolkit.engine.kv.device_memory import DeviceMemory

    return DeviceMemory(device)
