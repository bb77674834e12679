"""Why a GPU test is skipped, and the settings that its ranks need on a host that others share."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

GPUS = torch.cuda.device_count()

# NVLink multicast can take a shared host's GPUs out of service; the engine does not use it
for name, value in (
    ("NCCL_NVLS_ENABLE", "0"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
):
    os.environ.setdefault(name, value)


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPUs, this machine has {GPUS}")


SIZES = [pytest.param(n, marks=needs_gpus(n)) for n in (1, 2, 4)]  # of groups of GPUs


def needs_library(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name} (pip install 'wideep-toolkit[gpu]')")
