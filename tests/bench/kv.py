"""KV transfer beside the raw NIXL library: ``make bench-kv``.

Two processes. The same bytes are read three ways, in turns: by ``NixlTransfer`` as the engine uses it (pieces of a
block table, polled), by bare NIXL calls with descriptors made beforehand, and by ``LocalTransfer``. Sizes: one
contiguous read of 4 KiB to 256 MiB, and KV caches as they are: many small blocks over many layers. The engine's reads
include making descriptors; adjacent blocks are merged there, so that it may be the faster one.
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

KIB, MIB = 1 << 10, 1 << 20
POOL = 512 * MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(options.serve)
        return
    rng = np.random.default_rng(0)
    cases = {f"1 x {name(size)}": contiguous(size) for size in (4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)}
    cases["1024 x 4.0 KiB apart"] = scattered(rng, 1024, 4 * KIB)
    cases["256 x 64.0 KiB apart"] = scattered(rng, 256, 64 * KIB)
    cases["61 layers x 16 blocks of 72.0 KiB (MLA, 1k tokens)"] = layered(rng, 61, 16, 72 * KIB)
    cases["the same, blocks in a row"] = layered(None, 61, 16, 72 * KIB)
    cases["2 x 32 layers x 64 blocks of 16.0 KiB (GQA, 1k tokens)"] = layered(rng, 64, 64, 16 * KIB)
    readers = {way: Reader(way) for way in ("nixl", "local")}
    print(f"{'read':<56} {'NixlTransfer':>20} {'raw NIXL':>20} {'ratio':>6} {'LocalTransfer':>20}   (GB/s)")
    for label, rows in cases.items():
        times: dict[str, list[float]] = {"nixl": [], "raw": [], "local": []}
        raw = readers["nixl"].raw(rows)
        for repeat in range(options.repeats + 2):
            for way, read in (("nixl", readers["nixl"].read), ("raw", raw), ("local", readers["local"].read)):
                begin = time.perf_counter()
                read(rows)
                if repeat > 1:
                    times[way].append(time.perf_counter() - begin)
        size = int(rows[:, 4].sum())
        ratio = statistics.median(r / n for n, r in zip(times["nixl"], times["raw"]))
        shown = {way: rate(size, values) for way, values in times.items()}
        print(f"{label:<56} {shown['nixl']:>20} {shown['raw']:>20} {ratio:>6.2f} {shown['local']:>20}", flush=True)
    for reader in readers.values():
        reader.close()


def serve(backend: str) -> None:
    """The other process: offers memory until its input ends."""
    transfer = TRANSFERS[backend]("bench-peer")
    memory = transfer.allocate(POOL, "cpu")
    memory.fill_(7)
    print("endpoint", transfer.register([memory]).hex(), flush=True)
    transfer.attend(True)
    sys.stdin.read()


class Reader:
    """One way to read, and its peer."""

    def __init__(self, backend: str) -> None:
        command = [sys.executable, "-m", "tests.bench.kv", "--serve", backend]
        self._peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._peer.stdout is not None
        while not (line := self._peer.stdout.readline()).startswith("endpoint"):
            assert line, "the peer has ended"
        self._endpoint = bytes.fromhex(line.split()[1])
        self._transfer: KVTransfer = TRANSFERS[backend]("bench-reader")
        self._memory = self._transfer.allocate(POOL, "cpu")
        self._memory.fill_(1)
        self._transfer.register([self._memory])
        self._name = self._transfer.connect(self._endpoint)

    def read(self, rows: np.ndarray) -> None:
        read = self._transfer.start_read(self._name, merged(rows))
        while (state := self._transfer.poll(read)) == "running":
            time.sleep(0)
        assert state == "done", read.error

    def raw(self, rows: np.ndarray) -> Callable[[np.ndarray], None]:
        """Bare NIXL, with descriptor lists made beforehand, one entry a block."""
        assert isinstance(self._transfer, NixlTransfer)
        agent: Any = self._transfer._agent
        base = msgspec.msgpack.decode(self._endpoint, type=Endpoint).regions[0]
        here = agent.get_xfer_descs(_descriptors(self._memory.data_ptr() + rows[:, 1], rows[:, 4], 0), "DRAM")
        there = agent.get_xfer_descs(_descriptors(base + rows[:, 3], rows[:, 4], 0), "DRAM")

        def read(_: np.ndarray) -> None:
            handle = agent.initialize_xfer("READ", here, there, self._name)
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(0)
                state = agent.check_xfer_state(handle)
            assert state == "DONE", state
            handle.release()

        return read

    def close(self) -> None:
        self._transfer.close()
        self._peer.kill()
        self._peer.wait()


def contiguous(size: int) -> np.ndarray:
    return np.array([[0, 0, 0, 0, size]])


def scattered(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    mine, theirs = (rng.permutation(POOL // size // 2)[:count] * 2 * size for _ in range(2))
    zero = np.zeros(count, np.int64)
    return np.stack([zero, mine, zero, theirs, np.full(count, size)], axis=1)


def layered(rng: np.random.Generator | None, layers: int, blocks: int, size: int) -> np.ndarray:
    """A request's blocks in each of many layers, at random places or one after the other."""
    per_layer = POOL // layers // size
    ids = np.arange(blocks) if rng is None else rng.permutation(per_layer)[:blocks]
    parts = [scattered_at(layer * per_layer * size, ids, size) for layer in range(layers)]
    return np.concatenate(parts)


def scattered_at(base: int, ids: np.ndarray, size: int) -> np.ndarray:
    at, zero = base + ids * size, np.zeros(len(ids), np.int64)
    return np.stack([zero, at, zero, at, np.full(len(ids), size)], axis=1)


def merged(rows: np.ndarray) -> np.ndarray:
    """Adjacent pieces as one, as ``layout.pieces`` makes them from a block table."""
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
    return f"{size / KIB:.1f} KiB" if size < MIB else f"{size / MIB:.1f} MiB"


if __name__ == "__main__":
    main()
