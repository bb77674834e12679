"""The device of a rank: which GPU, and what torch and the communication libraries must be told before they start.

Knows neither models nor process groups. Read next: ``prepare.py``.
"""

from __future__ import annotations

import logging
import os

import torch

log = logging.getLogger(__name__)

# NVLink multicast sets up fabric state that outlives a process; on a shared host one that dies badly can leave the
# GPUs unusable for everybody. Nothing here needs it, so it is off unless the user says otherwise.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def use(name: str, local_rank: int) -> str:
    """Makes ``name`` (cpu, cuda) this process's device and returns it: ``cpu``, or ``cuda:<local_rank>``.

    Raises:
        ValueError: there is no such GPU.
    """
    if name == "cpu":
        return "cpu"
    for key, value in NO_MULTICAST.items():
        os.environ.setdefault(key, value)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"cluster.device={name}: this rank is number {local_rank} on its host, where torch sees {count} GPUs: use "
            "cluster.gpus_per_node as the host has them, or cluster.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.enabled = False  # nothing convolves, and an older cuDNN than torch's stops it
    return f"cuda:{local_rank}"


def total_bytes(device: str) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def used_bytes(device: str) -> int:
    """What is taken on the GPU, by this process or another."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free
