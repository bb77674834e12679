"""How a read is cut for the kernel that copies between GPUs, and the kernel itself in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.engine.kv.device_memory import cut


def test_long_spans_are_cut_and_nothing_is_lost() -> None:
    spans = np.array([[0, 1000, 10], [64, 5000, 0], [128, 9000, 25], [256, 12000, 8]])
    parts = cut(spans, 8)
    assert parts[:, 2].max() <= 8 and parts[:, 2].sum() == spans[:, 2].sum()
    copied = {(to + i, source + i) for to, source, size in parts.tolist() for i in range(size)}
    assert copied == {(to + i, source + i) for to, source, size in spans.tolist() for i in range(size)}
    assert cut(spans[:0], 8).shape == (0, 3)


def copied(aligned: bool) -> None:
    """Words or bytes between two tensors, through addresses: only what the spans name, and all of it."""
    from toolkit.engine.kernels.spans import copy_spans

    source, to = torch.arange(100_000) % 251, torch.zeros(100_000, dtype=torch.uint8)
    source = source.to(torch.uint8)
    step = 8 if aligned else 1
    rows = [(16 * step, 32 * step, 40_000), (50_000, 8 * step, 7 * step), (60_000, 40_000, 0), (70_000, 80_000, step)]
    spans = torch.tensor([[to.data_ptr() + a, source.data_ptr() + b, size] for a, b, size in rows])
    copy_spans(spans, 40_000, aligned)
    expected = torch.zeros_like(to)
    for a, b, size in rows:
        expected[a : a + size] = source[b : b + size]
    assert torch.equal(to, expected)


@pytest.mark.skipif(not find_spec("triton"), reason="needs triton (pip install triton), which is 1 GB")
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernel_copies_spans(aligned: bool) -> None:
    """In a process of its own: Triton looks at TRITON_INTERPRET when it is imported."""
    script = f"from tests.unit.test_kv_spans import copied; copied({aligned})"
    env = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
