"""GPU libraries that compile kernels when they are first used: how they are imported, and where their results are kept.

One folder for all runs of a user and all ranks of a node, so that a kernel is compiled once: ``$WIDEEP_CACHE`` or
``~/.cache/wideep-toolkit``, in it ``jit``. Variables that the user has set are left alone.
Knows no kernels. Read next: ``moe/deep_gemm.py``, ``moe/deepep.py``.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from toolkit.cache import cache_dir

log = logging.getLogger(__name__)

RDMA_DEVICES = Path("/sys/class/infiniband")


def kernels_dir() -> Path:
    """Where compiled kernels are kept."""
    return cache_dir() / "jit"


def has_rdma(devices: Path = RDMA_DEVICES) -> bool:
    """True when this host has a network card that DeepEP can use between hosts."""
    return devices.is_dir() and any(devices.iterdir())


def has_deep_gemm() -> bool:
    """True when DeepGEMM is installed and this process has a GPU that it runs on (Hopper, Blackwell)."""
    import torch

    return (
        find_spec("deep_gemm") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] in (9, 10)
    )


@cache
def scales_are_powers_of_two() -> bool:
    """True on Blackwell, whose GEMMs on FP8 read the exponents of scales alone (UE8M0). That path was not run."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10


def prepare(environment: MutableMapping[str, str] | None = None, rdma: bool | None = None) -> dict[str, str]:
    """Sets what DeepEP and DeepGEMM read when they are imported, where the user has not; returns what was set."""
    environment = os.environ if environment is None else environment
    rdma = has_rdma() if rdma is None else rdma
    wanted = {
        "DG_JIT_CACHE_DIR": (str(kernels_dir() / "deep_gemm"), "kernels compiled once a node, kept between runs"),
        "EP_JIT_CACHE_DIR": (str(kernels_dir() / "deep_ep"), "kernels compiled once a node, kept between runs"),
    }
    if not rdma:
        why = f"no RDMA device in {RDMA_DEVICES}: ranks of this host reach each other by NVLink"
        wanted["EP_DISABLE_GIN"] = "1", why
    changed = {}
    for name, (value, why) in wanted.items():
        if name not in environment:
            environment[name] = changed[name] = value
            log.info("%s=%s (%s)", name, value, why)
    return changed


@cache
def import_gpu_library(module: str, setting: str) -> ModuleType:
    """``module``, of the extra ``gpu``, with its environment prepared; at no cost but the first time.

    Raises:
        ValueError: it is not installed, or its own needs are not met; ``setting`` asked for it.
    """
    prepare()
    try:
        return importlib.import_module(module)
    except (ImportError, AssertionError) as error:
        raise ValueError(
            f"{setting} needs the library {module}, which cannot be imported ({type(error).__name__}: {error}): "
            "pip install 'wideep-toolkit[gpu]' on a host with an NVIDIA driver and nvcc (CUDA_HOME), or choose another"
        ) from error


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Holds the node's lock on ``what``: the first rank compiles it, the others find it in the cache."""
    folder = kernels_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
