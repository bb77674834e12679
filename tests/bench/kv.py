"""KV transfer beside the raw NIXL library: ``make bench-kv``; between two GPUs: ``make bench-kv ARGS='--device cuda'``.

Two processes. The same bytes are read in turns by ``NixlTransfer`` as the engine uses it, by bare NIXL calls with
descriptors made beforehand (``prepared``: with NIXL's prepared lists, of which a read picks entries), and by
``LocalTransfer``; on GPUs also by torch's copy from one GPU to the other, in one process. Sizes: one contiguous read of
4 KiB to 256 MiB (GPUs: 64 KiB to 1 GiB), and KV caches as they are: many small blocks over many layers. The engine's
reads include making descriptors, which it makes of runs of blocks: it may be the faster one.
``UCX_TLS=tcp make bench-kv`` measures TCP. Figures are medians and the spread from the 10th to the 90th percentile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

from toolkit.engine.kv.nixl import Endpoint, NixlTransfer, _descriptors
from toolkit.engine.kv.transfer import TRANSFERS, KVTransfer

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONTENT = 7
Read = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: GPU 0 reads from GPU 1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(options.serve, options.device)
        return
    cuda = options.device == "cuda"
    pool = 4 * GIB if cuda else 512 * MIB
    readers = {way: Reader(way, options.device, pool) for way in ("nixl", "local")}
    peer = PeerCopy(pool) if cuda else None
    names = ["NixlTransfer", "raw NIXL", "prepared", "LocalTransfer"] + ["peer copy"] * cuda
    print(f"{'read':<56} " + " ".join(f"{name:>20}" for name in names) + "   (GB/s)   NixlTransfer / raw")
    for label, rows in cases(pool, cuda).items():
        ways = [
            readers["nixl"].way(rows), readers["nixl"].raw(rows), readers["nixl"].prepared(rows),
            readers["local"].way(rows),
        ] + ([peer.way(rows)] if peer else [])  # fmt: skip
        times: list[list[float]] = [[] for _ in ways]
        for repeat in range(options.repeats + 2):
            for way, taken in zip(ways, times):
                begin = time.perf_counter()
                way()
                if repeat > 1:
                    taken.append(time.perf_counter() - begin)
        for reader in readers.values():
            reader.verify(rows)
        ratio = statistics.median(r / n for n, r in zip(times[0], times[1]))
        shown = " ".join(f"{rate(int(rows[:, 4].sum()), taken):>20}" for taken in times)
        print(f"{label:<56} {shown}            {ratio:>6.2f}", flush=True)
    for reader in readers.values():
        reader.close()


def cases(pool: int, cuda: bool) -> dict[str, np.ndarray]:
    """Rows to read, by name."""
    rng = np.random.default_rng(0)
    sizes = (64 * KIB, MIB, 16 * MIB, 256 * MIB, GIB) if cuda else (4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)
    found = {f"1 x {name(size)}": contiguous(size) for size in sizes}
    found["1024 x 4.0 KiB apart"] = scattered(rng, pool, 1024, 4 * KIB)
    found["256 x 64.0 KiB apart"] = scattered(rng, pool, 256, 64 * KIB)
    found["61 layers x 16 blocks of 72.0 KiB (MLA, 1k tokens)"] = layered(rng, pool, 61, 16, 72 * KIB)
    found["the same, blocks in a row"] = layered(None, pool, 61, 16, 72 * KIB)
    found["2 x 48 layers x 16 blocks of 64.0 KiB (GQA, 1k tokens)"] = layered(rng, pool, 96, 16, 64 * KIB)
    found["the same, blocks in a row "] = layered(None, pool, 96, 16, 64 * KIB)
    return found


def serve(backend: str, device: str) -> None:
    """The other process: offers memory until its input ends."""
    transfer = TRANSFERS[backend]("bench-peer")
    place = device if device == "cpu" else f"cuda:{torch.cuda.device_count() - 1}"
    if device != "cpu":
        torch.cuda.set_device(place)
    memory = transfer.allocate(int(sys.stdin.readline()), place)
    memory.fill_(CONTENT)
    print("endpoint", transfer.register([memory]).hex(), flush=True)
    transfer.attend(True)
    sys.stdin.read()


class Reader:
    """One way to read, and its peer."""

    def __init__(self, backend: str, device: str, pool: int) -> None:
        command = [sys.executable, "-m", "tests.bench.kv", "--serve", backend, "--device", device]
        self._peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._peer.stdout is not None and self._peer.stdin is not None
        self._peer.stdin.write(f"{pool}\n")
        self._peer.stdin.flush()
        while not (line := self._peer.stdout.readline()).startswith("endpoint"):
            assert line, "the peer has ended"
        self._endpoint = bytes.fromhex(line.split()[1])
        self._transfer: KVTransfer = TRANSFERS[backend]("bench-reader")
        self._memory = self._transfer.allocate(pool, device if device == "cpu" else "cuda:0")
        self._memory.fill_(1)
        self._transfer.register([self._memory])
        self._name = self._transfer.connect(self._endpoint)

    def way(self, rows: np.ndarray) -> Read:
        pieces = merged(rows)  # as `layout.pieces` makes them from block tables

        def read() -> None:
            read = self._transfer.start_read(self._name, pieces)
            while (state := self._transfer.poll(read)) == "running":
                time.sleep(0)
            assert state == "done", read.error

        return read

    def raw(self, rows: np.ndarray) -> Read:
        """Bare NIXL, with descriptor lists made beforehand, one entry a block."""
        agent, here, there = self._descriptors(rows)
        return lambda: self._finish(agent, agent.initialize_xfer("READ", here, there, self._name))

    def prepared(self, rows: np.ndarray) -> Read:
        """Bare NIXL, with both lists prepared once and all their entries picked by number."""
        agent, here, there = self._descriptors(rows)
        mine, theirs = agent.prep_xfer_dlist("", here), agent.prep_xfer_dlist(self._name, there)
        numbers = np.arange(len(rows), dtype=np.int32)
        return lambda: self._finish(agent, agent.make_prepped_xfer("READ", mine, numbers, theirs, numbers))

    def _descriptors(self, rows: np.ndarray) -> tuple[Any, Any, Any]:
        assert isinstance(self._transfer, NixlTransfer)
        agent: Any = self._transfer._agent
        peer = msgspec.msgpack.decode(self._endpoint, type=Endpoint)
        here = _descriptors(self._memory.data_ptr() + rows[:, 1], rows[:, 4], self._transfer._device)
        there = _descriptors(peer.regions[0] + rows[:, 3], rows[:, 4], peer.device)
        return agent, agent.get_xfer_descs(here, peer.memory), agent.get_xfer_descs(there, peer.memory)

    @staticmethod
    def _finish(agent: Any, handle: Any) -> None:
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(0)
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        handle.release()

    def verify(self, rows: np.ndarray) -> None:
        for _, at, _, _, size in rows[[0, len(rows) // 2, -1]]:
            assert bool((self._memory[at : at + size] == CONTENT).all()), "bytes did not arrive"
        self._memory.fill_(1)

    def close(self) -> None:
        self._transfer.close()
        self._peer.kill()
        self._peer.wait()


class PeerCopy:
    """What torch reaches between the two GPUs in one process."""

    def __init__(self, pool: int) -> None:
        self._here = torch.zeros(pool, dtype=torch.uint8, device="cuda:0")
        self._there = torch.full((pool,), CONTENT, dtype=torch.uint8, device=f"cuda:{torch.cuda.device_count() - 1}")

    def way(self, rows: np.ndarray) -> Read:
        spans = merged(rows)
        here = [self._here[at : at + size] for _, at, _, _, size in spans]
        there = [self._there[at : at + size] for _, _, _, at, size in spans]

        def read() -> None:
            for to, source in zip(here, there):
                to.copy_(source, non_blocking=True)
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(self._there.device)

        return read


def contiguous(size: int) -> np.ndarray:
    return np.array([[0, 0, 0, 0, size]])


def scattered(rng: np.random.Generator, pool: int, count: int, size: int) -> np.ndarray:
    mine, theirs = (rng.permutation(pool // size // 2)[:count] * 2 * size for _ in range(2))
    zero = np.zeros(count, np.int64)
    return np.stack([zero, mine, zero, theirs, np.full(count, size)], axis=1)


def layered(rng: np.random.Generator | None, pool: int, layers: int, blocks: int, size: int) -> np.ndarray:
    """A request's blocks in each of many layers, at random places or one after the other."""
    per_layer = pool // layers // size
    ids = np.arange(blocks) if rng is None else rng.permutation(per_layer)[:blocks]
    parts = [scattered_at(layer * per_layer * size, ids, size) for layer in range(layers)]
    return np.concatenate(parts)


def scattered_at(base: int, ids: np.ndarray, size: int) -> np.ndarray:
    at, zero = base + ids * size, np.zeros(len(ids), np.int64)
    return np.stack([zero, at, zero, at, np.full(len(ids), size)], axis=1)


def merged(rows: np.ndarray) -> np.ndarray:
    """Adjacent pieces as one."""
    ends = rows[:-1, [1, 3]] + rows[:-1, 4:]
    begins = np.flatnonzero(np.r_[True, (ends != rows[1:, [1, 3]]).any(axis=1)])
    found = rows[begins].copy()
    found[:, 4] = np.add.reduceat(rows[:, 4], begins)
    return found


def rate(size: int, seconds: list[float]) -> str:
    """``12.3 (11.0-13.1)``"""
    rates = sorted(size / s / 1e9 for s in seconds)
    low, high = rates[len(rates) // 10], rates[-1 - len(rates) // 10]
    return f"{statistics.median(rates):.2f} ({low:.2f}-{high:.2f})"


def name(size: int) -> str:
    return next(
        f"{size / unit:.1f} {word}" for unit, word in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if size >= unit
    )


if __name__ == "__main__":
    main()
