"""NixlTransfer: reads over NIXL's UCX backend: shared memory, TCP, RDMA or GPU direct, whatever both sides have.

One agent a process, without NIXL's own progress thread: that one spins, and where ranks outnumber cores a transfer then
takes tens of milliseconds. Here a thread of ours moves UCX on while ``attend`` says that somebody reads, and sleeps
between; over TCP nothing moves while the target looks away, and ranks look away during a forward pass.
NIXL says when a peer died, never when it stands still: deadlines are the caller's. Read next: ``transfer.py``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.kv.transfer import Read, ReadState

log = logging.getLogger(__name__)

PROGRESS_S = 0.0005  # between two looks at UCX while somebody reads
# UCX reads a peer's GPU memory directly only where it finds NVLinks by a query that virtual machines do not answer.
# Without, it falls back to TCP: a thousandth of the speed, and no word about it.
UCX_SETTINGS = {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"}


class Endpoint(msgspec.Struct, frozen=True):
    """What a peer needs: the agent's metadata, and where each region begins. ``memory``: DRAM or VRAM."""

    metadata: bytes
    memory: str
    device: int
    regions: list[int]


class NixlRead:
    """A read in flight."""

    def __init__(self, num_bytes: int, peer: str, handle: Any) -> None:
        self.num_bytes, self.error, self.ended, self.peer = num_bytes, "", 0.0, peer
        self.handle, self.state = handle, "PROC"


class NixlTransfer:
    """See ``transfer.KVTransfer``.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, name: str) -> None:
        api = _import()
        for key, value in UCX_SETTINGS.items() if torch.cuda.is_available() else ():
            os.environ.setdefault(key, value)
        # A name is an identity: a process that comes back must not be taken for the one that was.
        self._name = f"{name}-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._agent = api.nixl_agent(self._name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._memory, self._device = "DRAM", 0
        self._regions = np.empty(0, np.int64)
        self._peers: dict[bytes, str] = {}
        self._peer_regions: dict[str, tuple[NDArray[np.int64], str, int]] = {}
        self._released: list[str] = []
        self._reads: list[NixlRead] = []  # in flight
        self._active, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._progress, name="kv-progress", daemon=True)
        self._thread.start()

    def allocate(self, num_bytes: int, device: str) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def register(self, regions: Sequence[Tensor]) -> bytes:
        first = regions[0]
        if first.is_cuda:
            self._memory, self._device = "VRAM", first.get_device()
            torch.cuda.synchronize(self._device)  # peers know no streams of this process
        storages = {region.untyped_storage().data_ptr(): region.untyped_storage().nbytes() for region in regions}
        with self._lock:
            whole = [(at, size, self._device, "") for at, size in storages.items()]
            self._agent.register_memory(whole, self._memory)
            metadata = self._agent.get_agent_metadata()
        self._regions = np.array([region.data_ptr() for region in regions], np.int64)
        return msgspec.msgpack.encode(Endpoint(metadata, self._memory, self._device, self._regions.tolist()))

    def connect(self, endpoint: bytes) -> str:
        if endpoint in self._peers:
            return self._peers[endpoint]
        found = msgspec.msgpack.decode(endpoint, type=Endpoint)
        try:
            with self._lock:
                name = self._agent.add_remote_agent(found.metadata)
        except Exception as error:  # the library's own classes
            raise ValueError(f"the peer cannot be connected: {type(error).__name__}: {error}") from None
        peer = name.decode() if isinstance(name, bytes) else str(name)
        self._peer_regions[peer] = (np.array(found.regions, np.int64), found.memory, found.device)
        self._peers[endpoint] = peer
        return peer

    def start_read(self, peer: str, pieces: NDArray[np.int64]) -> Read:
        regions, memory, device = self._peer_regions[peer]
        region, offset, peer_region, peer_offset, size = pieces.T
        here = _descriptors(self._regions[region] + offset, size, self._device)
        there = _descriptors(regions[peer_region] + peer_offset, size, device)
        read = NixlRead(int(size.sum()), peer, None)
        try:
            with self._lock:
                agent = self._agent
                mine, theirs = agent.get_xfer_descs(here, self._memory), agent.get_xfer_descs(there, memory)
                read.handle = agent.initialize_xfer("READ", mine, theirs, peer)
                read.state = agent.transfer(read.handle)
                self._note(read)
        except Exception as error:
            read.state, read.error, read.ended = "ERR", f"{type(error).__name__}: {error}", time.monotonic()
        return read

    def poll(self, read: Read) -> ReadState:
        assert isinstance(read, NixlRead)
        with self._lock:
            self._look(read)
        if read.state == "DONE":
            self._release(read)
            return "done"
        if read.state == "PROC":
            return "running"
        read.error = read.error or "NIXL reports an error"
        self._release(read)
        self._disconnect(read.peer)
        self._release(read)
        return "failed"

    def cancel(self, read: Read) -> None:
        """A read that UCX cannot take back ends with the connection to its peer, other reads from it included."""
        assert isinstance(read, NixlRead)
        with self._lock:
            if read.state == "PROC":
                read.state, read.error = "ERR", "cancelled"
                self._note(read)
        if not self._release(read):
            self._disconnect(read.peer)
            if not self._release(read):
                log.error("a read from %s could not be ended", read.peer)

    def notify(self, peer: str, tag: str) -> None:
        with contextlib.suppress(Exception), self._lock:  # it is gone, and what it kept with it
            self._agent.send_notif(peer, tag.encode())

    def released(self) -> list[str]:
        with self._lock:
            self._collect()
            tags, self._released = self._released, []
        return tags

    def attend(self, active: bool) -> None:
        if active:
            self._active.set()
        else:
            self._active.clear()

    def close(self) -> None:
        self._closing = True
        self._active.set()
        self._thread.join(timeout=2.0)

    def _progress(self) -> None:
        bound = False
        while not self._closing:
            self._active.wait()
            if self._memory == "VRAM" and not bound:
                torch.cuda.set_device(self._device)  # UCX copies in the calling thread's context
                bound = True
            with self._lock:
                self._collect()
                for read in list(self._reads):
                    self._look(read)
            time.sleep(PROGRESS_S)

    def _collect(self) -> None:
        """Takes notifications, which moves UCX on. Under the lock."""
        try:
            for tags in self._agent.get_new_notifs().values():
                self._released += [tag.decode(errors="replace") for tag in tags]
        except Exception as error:
            log.warning("NIXL notifications: %s: %s", type(error).__name__, error)

    def _look(self, read: NixlRead) -> None:
        """Asks how a read is doing. Under the lock."""
        if read.state != "PROC":
            return
        try:
            read.state = self._agent.check_xfer_state(read.handle)
        except Exception as error:
            read.state, read.error = "ERR", f"{type(error).__name__}: {error}"
        self._note(read)

    def _note(self, read: NixlRead) -> None:
        """Keeps the list of reads in flight, and when each has ended. Under the lock."""
        if read.state == "PROC":
            if read not in self._reads:
                self._reads.append(read)
            return
        read.ended = read.ended or time.monotonic()
        if read in self._reads:
            self._reads.remove(read)

    def _release(self, read: NixlRead) -> bool:
        """Gives the library's handle back; False while UCX may still write."""
        if read.handle is None:
            return True
        try:
            with self._lock:
                read.handle.release()
        except Exception:
            return False
        read.handle = None
        return True

    def _disconnect(self, peer: str) -> None:
        """Forgets a peer; the next ``connect`` to it begins anew."""
        log.warning("KV transfer: connection to %s is closed", peer)
        self._peers = {endpoint: name for endpoint, name in self._peers.items() if name != peer}
        with contextlib.suppress(Exception), self._lock:
            self._agent.remove_remote_agent(peer)


def _descriptors(addresses: NDArray[np.int64], sizes: NDArray[np.int64], device: int) -> NDArray[np.uint64]:
    """[n, 3]: address, bytes, device."""
    rows = np.empty((len(sizes), 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = addresses, sizes, device
    return rows


def _import() -> Any:
    """NIXL's Python API, from whichever wheel is there."""
    for package in ("nixl_cu13", "nixl_cu12"):
        with contextlib.suppress(ImportError):
            return __import__(f"{package}._api", fromlist=["nixl_agent"])
    raise ValueError(
        "deploy.disaggregation_transfer_backend=nixl needs the package nixl-cu13: pip install -e '.[nixl]', or "
        "use local"
    )
