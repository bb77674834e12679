"""A peer of the transfer tests: a process that offers one region of known bytes, and obeys its parent.

``python -m tests.contract.transfer_peer BACKEND BYTES DEVICE``; prints ``endpoint HEX``, then for each line
``released`` one with the tags so far. Other lines are the backend's own.
"""

from __future__ import annotations

import sys
import time

import torch

from toolkit.engine.kv.transfer import TRANSFERS


def content(num_bytes: int) -> torch.Tensor:
    return (torch.arange(num_bytes, dtype=torch.int64) * 2654435761 % 251).to(torch.uint8)


def main() -> None:
    backend, num_bytes, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    transfer = TRANSFERS[backend]("peer")
    memory = transfer.allocate(num_bytes, device)
    memory.copy_(content(num_bytes))
    print("endpoint", transfer.register([memory]).hex(), flush=True)
    transfer.attend(True)
    tags: list[str] = []
    for line in sys.stdin:
        assert line.strip() == "released", line
        deadline = time.monotonic() + 10
        while not (found := transfer.released()) and time.monotonic() < deadline:
            time.sleep(0.001)
        tags += found
        print("released", *tags, flush=True)
    transfer.close()


if __name__ == "__main__":
    main()
