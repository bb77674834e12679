"""Ranks end together: also one that waits for a message of which half was sent when its peer was killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from tests.dist.ranks import _context
from tests.process.test_launch_processes import eventually
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups
from toolkit.engine.peers import Peers
from toolkit.launch import ports

RANKS = 3
BYTES = 512 << 20  # more than sockets hold, and than is sent before a process has stopped itself


def _rank(folder: Path, rank: int, port: int, role: Callable[..., None], *args: object) -> None:
    torch.set_num_threads(1)
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    dims = ParallelDims.of(ParallelConfig(RANKS, RANKS, RANKS, enable_dp_attention=True))
    groups = Groups.connect(dims, rank, "127.0.0.1", port, "cpu")
    peers = Peers(groups.tp_cpu, grace_s=1.0)
    role(groups, peers, *args)
    os._exit(0)


def start(folder: Path, role: Callable[..., None], *args: object) -> list[BaseProcess]:
    port = ports.free_range(1)
    ranks = [_context.Process(target=_rank, args=(folder, r, port, role, *args), daemon=True) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    return ranks


def wait_for_half(groups: Groups, peers: Peers, killed: str, begun: torch.Tensor) -> None:
    """The first rank waits for the last, which stops in the middle of their message; so does the second for the first.

    Args:
        killed: what the last one was: sender or receiver.
        begun: one byte in shared memory, set when the receiver has the first byte.
    """
    last = RANKS - 1
    source, target = (last, 0) if killed == "sender" else (0, last)
    sends, recvs = [], []
    data = torch.zeros(BYTES, dtype=torch.uint8)
    if groups.rank == source:
        data[0] = 1
        sends = [(data, target)]
    elif groups.rank == target:
        recvs = [(data, source)]
    else:
        recvs = [(data, 0)]
    works = groups.experts.exchange(sends, recvs)
    while groups.rank == target and not data[0]:
        pass
    begun |= groups.rank == target
    while groups.rank == last and not begun:
        pass
    if groups.rank == last:
        os.kill(os.getpid(), signal.SIGSTOP)
    for work in works:
        work.wait()


def leave(groups: Groups, peers: Peers) -> None:
    groups.tp_cpu.all_gather(torch.zeros(1))  # as all have agreed on it
    peers.leave()


@pytest.mark.parametrize("killed", ["sender", "receiver"])
def test_all_end_when_one_is_killed_in_the_middle_of_a_message(tmp_path: Path, killed: str) -> None:
    """gloo wakes nobody who waits for such a message."""
    ranks = start(tmp_path, wait_for_half, killed, torch.zeros(1, dtype=torch.bool).share_memory_())
    last = ranks[-1]
    assert last.pid is not None
    eventually(lambda: psutil.Process(last.pid).status() == psutil.STATUS_STOPPED, "the last rank stops")
    os.kill(last.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(60)
    logs = [(tmp_path / f"{r}.log").read_text() for r in range(RANKS)]
    assert [rank.exitcode for rank in ranks] == [1, 1, -signal.SIGKILL], logs
    for log in logs[:-1]:
        assert "rank 2 is gone" in log and "wait_for_half" in log, f"the reason and where it waited: {log}"


def test_ranks_that_leave_in_order_say_nothing(tmp_path: Path) -> None:
    ranks = start(tmp_path, leave)
    for rank in ranks:
        rank.join(60)
    logs = [(tmp_path / f"{r}.log").read_text() for r in range(RANKS)]
    assert [rank.exitcode for rank in ranks] == [0] * RANKS, logs
    assert logs == [""] * RANKS
