"""KV transfers between GPUs: the contract of ``tests/contract/test_transfers.py``, with the caches in device memory.

With two GPUs the peer's cache lies on the other one; with one, two processes share it.
"""

from __future__ import annotations

import pytest
import torch

from tests.contract import test_transfers as contract
from tests.contract.test_transfers import *  # noqa: F403  (its fixtures and tests, run once more here)
from tests.gpu.needs import needs_gpus

pytestmark = needs_gpus(1)


@pytest.fixture
def devices() -> tuple[str, str]:
    torch.cuda.set_device(0)
    return "cuda:0", f"cuda:{torch.cuda.device_count() - 1}"


def test_spans_of_odd_sizes_and_of_many_tiles(
    peer: contract.Peer, reader: tuple[contract.KVTransfer, torch.Tensor]
) -> None:
    """Bytes that are no whole words, spans longer than a part, and one of nothing."""
    transfer, memory = reader
    rows = torch.tensor([[0, 5, 0, 11, 700_001], [0, 800_000, 0, 3, 0], [0, 900_001, 0, 1_000_003, 13]]).numpy()
    name = transfer.connect(peer.endpoint)
    rows = rows if transfer.__class__.__name__ == "LocalTransfer" else rows[rows[:, 4] > 0]
    read = transfer.start_read(name, rows)
    assert contract.wait(transfer, read) == "done", read.error
    expected, source = torch.zeros(contract.SIZE, dtype=torch.uint8), contract.content(contract.SIZE)
    for _, to, _, start, size in rows:
        expected[to : to + size] = source[start : start + size]
    assert torch.equal(memory.cpu(), expected)
