"""Transfers: experts' bytes from the ranks that hold them into the spare buffers of those that will.

Between GPUs of one host the sender writes straight into the receiver's spare buffers (CUDA IPC): copy engines do it
beside the steps, no multiprocessor is taken, and no kernel waits for another rank's. Two kernels that wait for peers,
NCCL's and a dispatcher's, could each hold the processors that the other needs; so what goes between hosts goes by NCCL
on the stream of the steps, in the same order on all ranks, and is part of the pause. On CPUs gloo runs beside the
steps.
Knows bytes and ranks, not experts. Read next: ``mover.py``.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.engine.parallel import Comm

log = logging.getLogger(__name__)

ALIGNED = 256  # bytes, as GPUs like it
HANDLE = 64  # bytes of a CUDA IPC handle
HOST = 64  # bytes of a host name, as it is compared


@dataclass(frozen=True)
class Send:
    """One tensor of one expert: ``source`` goes to row ``spare`` of ``buffers[tensor]`` of rank ``peer`` of the set."""

    source: Tensor
    peer: int
    tensor: int
    spare: int


@dataclass(frozen=True)
class Recv:
    """The other end."""

    peer: int
    tensor: int
    spare: int


class Span(NamedTuple):
    """Two CUDA events."""

    begin: Any
    end: Any


class Timed:
    """Times what is queued on the current stream meanwhile; nothing without ``spans``."""

    def __init__(self, spans: list[Span] | None) -> None:
        self._spans = spans

    def __enter__(self) -> None:
        if self._spans is not None:
            self._span = Span(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._span.begin.record()

    def __exit__(self, *error: object) -> None:
        if self._spans is not None:
            self._span.end.record()
            self._spans.append(self._span)


class Transfers:
    """Spare buffers of one rank, and what goes into those of others.

    All ranks of ``comm`` make theirs at the same time, and start and finish the same transfers.

    Args:
        like: the tensors of a layer's slots, [e, ...] each.
        spare: rows of the buffers.
        comm: the ranks, for this alone.
        near: ranks of the set that are on this host, this one included.

    Attributes:
        buffers: like ``like``, with ``spare`` rows.
        direct: ranks of ``comm`` that this one writes to, with the address of their buffers.
    """

    def __init__(self, like: Sequence[Tensor], spare: int, comm: Comm, near: Sequence[int]) -> None:
        self._comm, self.device = comm, like[0].device
        self._rows = [t[0].nbytes for t in like]
        sizes = [-(-spare * row // ALIGNED) * ALIGNED for row in self._rows]
        self._first = [sum(sizes[:i]) for i in range(len(sizes))]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self.buffers = [
            self._memory[first : first + spare * row].view(t.dtype).view(spare, *t.shape[1:])
            for t, first, row in zip(like, self._first, self._rows)
        ]
        self.direct: dict[int, int] = {}
        self._works: list[dist.Work] = []
        self._arrived: list[Any] = []
        self._spans: list[Span] = []
        self._beside: list[Span] = []
        if self.device.type == "cuda":
            self._side, self._written = torch.cuda.Stream(self.device), torch.cuda.Event()
            comm.all_reduce(torch.zeros(1, device=self.device))  # NCCL connects all ranks, not those of a chunk
            self.direct = _open_peers(self._memory, comm, near)
            self.written()

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def warm_up(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Does once what loads or connects at its first use, tens of milliseconds that a step would wait for.

        All ranks at the same time. Args: ``rows``: of the buffers, as they are copied.
        """
        if self.device.type == "cpu":
            return
        for row in rows:
            torch._foreach_copy_([row[0], row[-1]], [row[-1], row[0]])
        for peer in self.direct:
            self._write(Send(self.buffers[0][0], peer, 0, 0))
        far = [peer for peer in range(self._comm.size) if peer not in (*self.direct, self._comm.rank)]
        byte, into = self._memory[:1], self._memory[1:2]
        for work in self._comm.exchange([(byte, peer) for peer in far], [(into, peer) for peer in far]):
            work.wait()
        torch.cuda.synchronize(self.device)

    def start(
        self, sends: Sequence[Send], recvs: Sequence[Recv], copies: Sequence[tuple[list[Tensor], list[Tensor]]]
    ) -> None:
        """Posts all; the order of what goes between two ranks is the same on both.

        Args:
            copies: (to, from) on this rank, for each tensor; whatever was queued to write sources has been told by
                ``written``.
        """
        far = [(_bytes(s.source), s.peer) for s in sends if s.peer not in self.direct]
        into = [(_bytes(self.buffers[r.tensor][r.spare]), r.peer) for r in recvs if r.peer not in self.direct]
        if self.device.type == "cpu":
            self._works = self._comm.exchange(far, into)
            self._copy(copies)
            return
        self._side.wait_event(self._written)
        with torch.cuda.stream(self._side), Timed(self._beside):
            self._copy(copies)
            for send in sends:
                if send.peer in self.direct:
                    self._write(send)
        self._arrived = [self._beside[-1].end]
        if far or into:
            with self.timed():
                for work in self._comm.exchange(far, into):
                    work.wait()  # has the stream of the steps wait
            self._arrived.append(self._spans[-1].end)

    def finish(self) -> None:
        """Waits until all that this rank sends and receives by itself is there; a peer's writes are the peer's to say.

        May be called by a thread of its own.
        """
        for work in self._works:
            work.wait()
        for event in self._arrived:
            event.synchronize()
        self._works, self._arrived = [], []

    def written(self) -> None:
        """Weights were written on the stream of the steps: what starts from now on reads them afterwards."""
        if self.device.type == "cuda":
            self._written.record()

    @property
    def settled(self) -> bool:
        """What was queued before ``written`` has happened: others may write to the buffers."""
        return self.device.type == "cpu" or bool(self._written.query())

    def timed(self) -> Timed:
        """A context for work that steps wait for."""
        return Timed(self._spans if self.device.type == "cuda" else None)

    def seconds(self) -> tuple[float, float]:
        """Device time since the last call, when ``settled``: that steps waited for, and beside them; 0 on CPUs."""
        spans = self._spans, self._beside
        self._spans, self._beside = [], []
        waited, beside = (sum(float(s.begin.elapsed_time(s.end)) for s in some) / 1e3 for some in spans)
        return waited, beside

    @staticmethod
    def _copy(copies: Sequence[tuple[list[Tensor], list[Tensor]]]) -> None:
        for into, out_of in copies:
            if into:
                torch._foreach_copy_(into, out_of)

    def _write(self, send: Send) -> None:
        size = self._rows[send.tensor]
        target = self.direct[send.peer] + self._first[send.tensor] + send.spare * size
        driver = _driver()
        _check(driver.cuMemcpyAsync(target, send.source.data_ptr(), size, self._side.cuda_stream))


def _bytes(slot: Tensor) -> Tensor:
    """What travels, whatever its type."""
    return slot.flatten().view(torch.uint8)


def _open_peers(memory: Tensor, comm: Comm, near: Sequence[int]) -> dict[int, int]:
    """Addresses of the buffers of the ranks on this host; none, on all, where a rank cannot open another's."""
    try:
        handle, offset = _export(memory)
        why = ""
    except (ImportError, RuntimeError) as error:
        handle, offset, why = bytes(HANDLE), 0, f"{error}"
    host = socket.gethostname().encode()[:HOST].ljust(HOST, b"\0")
    mine = handle + offset.to_bytes(8, "little") + host
    rows = comm.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8)[None])
    told = [bytes(row.tolist()) for row in rows]
    opened: dict[int, int] = {}
    for peer in near:
        if peer == comm.rank or why:
            continue
        if told[peer][HANDLE + 8 :] != host:
            why = f"rank {peer} of the set is on another host"
            continue
        try:
            opened[peer] = _open(told[peer][:HANDLE]) + int.from_bytes(told[peer][HANDLE : HANDLE + 8], "little")
        except RuntimeError as error:
            why = f"{error}"
    failed = comm.all_gather(torch.tensor([len(why)]))
    if failed.any():
        log.warning(
            "experts that move go by NCCL, between the steps, since the GPUs of a host do not open each other's "
            "memory: %s", why or f"ranks {failed.nonzero().flatten().tolist()} of the set say so in their logs",
        )  # fmt: skip
        return {}
    return opened


def _driver() -> Any:
    """The driver's bindings, which torch for CUDA brings along."""
    from cuda.bindings import driver

    return driver


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call."""
    if int(result[0]):
        raise RuntimeError(f"CUDA says {result[0].name}")
    return result[1] if len(result) > 1 else None


def _export(memory: Tensor) -> tuple[bytes, int]:
    """An IPC handle of the allocation that ``memory`` is in, and where it begins there."""
    driver, address = _driver(), memory.data_ptr()
    base = int(_check(driver.cuMemGetAddressRange(address)))
    return bytes(_check(driver.cuIpcGetMemHandle(base)).reserved), address - base


def _open(handle: bytes) -> int:
    """The address here of another process's allocation."""
    driver = _driver()
    given = driver.CUipcMemHandle()
    given.reserved = handle
    return int(_check(driver.cuIpcOpenMemHandle(given, int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS))))
