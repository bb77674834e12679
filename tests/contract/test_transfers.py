"""The contract of every KV transfer: equal bytes, released tags, what becomes of a read whose peer is no more."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
import pytest
import torch

from tests.contract.transfer_peer import content
from toolkit.engine.kv.transfer import TRANSFERS, KVTransfer, Read

SIZE = 1 << 22
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(not importlib.util.find_spec("nixl_cu13"), reason="needs nixl-cu13")
)


class Peer:
    """The other process."""

    def __init__(self, backend: str, num_bytes: int, device: str) -> None:
        command = [sys.executable, "-m", "tests.contract.transfer_peer", backend, str(num_bytes), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in: IO[str] = self.process.stdin
        self._out: IO[str] = self.process.stdout
        self.endpoint = bytes.fromhex(self._answer("endpoint")[0])

    def released(self) -> list[str]:
        self._in.write("released\n")
        self._in.flush()
        return self._answer("released")

    def _answer(self, name: str) -> list[str]:
        while not (line := self._out.readline()).startswith(name):
            assert line, "the peer has ended"
        return line.split()[1:]

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture(params=["local", NIXL])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def devices() -> tuple[str, str]:
    """Of reader and peer; ``tests/gpu/test_transfers.py`` has others."""
    return "cpu", "cpu"


@pytest.fixture
def peer(backend: str, devices: tuple[str, str]) -> Iterator[Peer]:
    peer = Peer(backend, SIZE, devices[1])
    yield peer
    peer.end()


@pytest.fixture
def reader(backend: str, devices: tuple[str, str]) -> Iterator[tuple[KVTransfer, torch.Tensor]]:
    transfer = TRANSFERS[backend]("reader")
    memory = transfer.allocate(SIZE, devices[0])
    transfer.register([memory])
    transfer.attend(True)
    yield transfer, memory
    transfer.close()


def wait(transfer: KVTransfer, read: Read, limit_s: float = 20.0) -> str:
    deadline = time.monotonic() + limit_s
    while (state := transfer.poll(read)) == "running" and time.monotonic() < deadline:
        time.sleep(0.001)
    return state


def settle(memory: torch.Tensor) -> None:
    """Transfers know no streams: what was launched must be over before they write."""
    if memory.is_cuda:
        torch.cuda.synchronize(memory.device)


def whole(size: int = SIZE) -> np.ndarray:
    return np.array([[0, 0, 0, 0, size]])


def test_bytes_arrive_equal_and_only_where_they_belong(peer: Peer, reader: tuple[KVTransfer, torch.Tensor]) -> None:
    transfer, memory = reader
    rng = np.random.default_rng(0)
    block = 4096
    mine, theirs = (rng.permutation(SIZE // block)[:300] for _ in range(2))
    rows = np.stack([0 * mine, mine * block, 0 * mine, theirs * block, np.full(300, block - 96)], axis=1)
    name = transfer.connect(peer.endpoint)
    read = transfer.start_read(name, rows)
    assert read.num_bytes == 300 * (block - 96)
    assert wait(transfer, read) == "done", read.error
    expected, source = torch.zeros(SIZE, dtype=torch.uint8), content(SIZE)
    for _, to, _, start, size in rows:
        expected[to : to + size] = source[start : start + size]
    assert torch.equal(memory.cpu(), expected)
    assert transfer.connect(peer.endpoint) == name


def test_the_owner_hears_what_was_read(peer: Peer, reader: tuple[KVTransfer, torch.Tensor]) -> None:
    transfer, _ = reader
    name = transfer.connect(peer.endpoint)
    assert wait(transfer, transfer.start_read(name, whole())) == "done"
    transfer.notify(name, "room-1")
    assert peer.released() == ["room-1"]


def test_nothing_is_written_after_a_cancel(peer: Peer, reader: tuple[KVTransfer, torch.Tensor]) -> None:
    """Also not by a peer that stands still during the read and goes on later."""
    transfer, memory = reader
    name = transfer.connect(peer.endpoint)
    assert wait(transfer, transfer.start_read(name, whole())) == "done"
    memory.zero_()
    settle(memory)
    peer.process.send_signal(signal.SIGSTOP)
    read = transfer.start_read(name, whole())
    transfer.cancel(read)
    assert transfer.poll(read) in ("failed", "done")
    memory.fill_(7)
    settle(memory)
    peer.process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert bool((memory == 7).all())


def test_a_read_from_a_killed_peer_ends(peer: Peer, reader: tuple[KVTransfer, torch.Tensor]) -> None:
    transfer, memory = reader
    name = transfer.connect(peer.endpoint)
    assert wait(transfer, transfer.start_read(name, whole())) == "done"
    peer.process.kill()
    peer.process.wait()
    read = transfer.start_read(name, whole())
    state = wait(transfer, read)
    assert (state == "failed" and read.error) or torch.equal(memory.cpu(), content(SIZE))
    transfer.notify(name, "room-2")


def test_a_peer_that_is_gone_before_the_first_read(
    backend: str, peer: Peer, reader: tuple[KVTransfer, torch.Tensor]
) -> None:
    transfer, _ = reader
    os.kill(peer.process.pid, signal.SIGKILL)
    peer.process.wait()
    try:
        name = transfer.connect(peer.endpoint)
    except ValueError:
        return
    read = transfer.start_read(name, whole())
    assert wait(transfer, read) == "failed"
    assert read.error


@pytest.mark.parametrize("garbage", [b"", b"\x00\x01", b"\x81\xa1a\x01"])
def test_an_endpoint_that_is_none_is_refused(garbage: bytes, reader: tuple[KVTransfer, torch.Tensor]) -> None:
    with pytest.raises(ValueError):
        reader[0].connect(garbage)
