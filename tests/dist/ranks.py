"""Runs a function on several ranks, each a process with one torch thread, and brings its results back.

Ranks talk by gloo on CPUs; with ``device="cuda"`` each has a GPU of its own and they talk by NCCL as well.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from toolkit.engine import device as devices
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups
from toolkit.launch import ports

# torch is imported once, in the server that ranks are forked from
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "toolkit.engine.runner", "toolkit.engine.models.base"])


def run_ranks(dims: ParallelDims, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """``function(groups, *args)`` on ``dims.tp_size`` ranks, with a GPU each if ``device`` is cuda -> its results."""
    port = ports.free_range(1)
    pipes, processes = [], []
    for rank in range(dims.tp_size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(there, dims, rank, port, device, function, args), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(240):
            raise TimeoutError(f"rank {rank} gave no result in 240 s")
        try:
            ok, value = pipe.recv()
        except EOFError:
            ok, value = False, "died"
        if not ok:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}: {value}")
        results.append(value)
    for process in processes:
        process.join()
    return results


def _rank(
    pipe: Connection,
    dims: ParallelDims,
    rank: int,
    port: int,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        groups = Groups.connect(dims, rank, "127.0.0.1", port, devices.use(device, rank))
        with torch.inference_mode():
            result = function(groups, *args)
        pipe.send((True, result))
        if device == "cuda":
            os._exit(0)  # GPU libraries may wait for their peers in destructors
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
