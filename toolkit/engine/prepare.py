"""From loaded weights to a rank that can serve: warm-up, memory, KV cache, graphs.

Every rank does the same here at the same time: warm-up steps run collectives, and all take the smallest KV cache. With
``mem_fraction_static`` the cache gets what weights, buffers, activations and graphs leave of that share; to know it,
the largest graph is captured once over a small cache first. Read next: ``runner.py``.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from toolkit.config.engine import EngineConfig
from toolkit.engine import device as devices
from toolkit.engine.arch import Arch, context_length
from toolkit.engine.core import SamplingParams, StepContext
from toolkit.engine.kv.kinds import layer_kinds
from toolkit.engine.linear_warm_up import warm_up_linears
from toolkit.engine.runner import ModelRunner

log = logging.getLogger(__name__)

GB = 10**9
PROBE = 2  # times the largest step: a KV cache that holds one such step, for measuring everything else


def prepare(runner: ModelRunner, progress: Callable[[str, int, int], None]) -> dict[str, int]:
    """Warms up, sizes the KV cache and captures graphs.

    Args:
        progress: called with stage, done and total.

    Returns:
        Bytes taken by kind; beside ``kv_cache`` only what was measured (GPUs).
    """
    engine, gpu = runner.engine, runner.device != "cpu"
    used: dict[str, int] = {}
    progress("warm-up", 0, 1)
    _compile(runner, lambda done, total: progress("compile", done, total))
    if engine.mem_fraction_static and not gpu:
        log.warning("engine.mem_fraction_static=%s has no effect on a CPU", engine.mem_fraction_static)
    if gpu and engine.mem_fraction_static:
        runner.allocate(_with_tokens(runner, PROBE * (engine.chunked_prefill_size + engine.page_size)))
    _warm_up(runner)
    if gpu:
        used["weights_and_buffers"] = _settled(runner.device) - runner.cache.num_bytes
        used["activations"] = _peak_of_largest_step(runner)
    sizes = runner.graphs_needed()
    if gpu and engine.mem_fraction_static:
        graphs = _graph_bytes(runner, sizes)
        tokens = _tokens_left(runner, engine.mem_fraction_static, sum(used.values()) + graphs)
        runner.allocate(_with_tokens(runner, tokens))
        _warm_up(runner)
    if sizes:
        before = _settled(runner.device)
        progress("graphs", 0, len(sizes))
        runner.capture(sizes, lambda done: progress("graphs", done, len(sizes)))
        used["graphs"] = _settled(runner.device) - before
    used["kv_cache"] = runner.cache.num_bytes
    if gpu:
        _log_memory(runner, used)
    progress("warm-up", 1, 1)
    return used


def _compile(runner: ModelRunner, progress: Callable[[int, int], None]) -> None:
    """Kernels whose code depends on the number of rows, for every number."""
    dims = runner.groups.dims
    runner.moe.warm_up(progress)
    # a dense FFN that is split over ranks multiplies the rows of all of them
    most = runner.engine.chunked_prefill_size * (dims.dp_size if dims.dense_tp > 1 else 1)
    warm_up_linears(runner.model, most, runner.groups.rank / dims.tp_size, progress)


def _warm_up(runner: ModelRunner) -> None:
    """One token on every rank, through every layer and collective, before the first request."""
    scheduler = runner.new_scheduler()
    scheduler.add("warm-up", [0], SamplingParams(max_tokens=1))
    ones = (1,) * runner.groups.dims.dp_size
    runner.step(scheduler.schedule(), StepContext(0, ones, ones, is_extend=True))


def _peak_of_largest_step(runner: ModelRunner) -> int:
    """Bytes that a prefill step of all the tokens allowed takes beside what stays."""
    scheduler, left = runner.new_scheduler(), runner.engine.chunked_prefill_size
    while left > 0:
        tokens = min(left, scheduler.max_len - 1)
        scheduler.add(f"warm-up-{left}", [0] * tokens, SamplingParams(max_tokens=1))
        left -= tokens
    batch = scheduler.schedule()
    dp = runner.groups.dims.dp_size
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.step(batch, StepContext(0, (batch.num_tokens,) * dp, (batch.num_logit_rows,) * dp, is_extend=True))
    return int(torch.cuda.max_memory_allocated() - before)


def _graph_bytes(runner: ModelRunner, sizes: tuple[int, ...]) -> int:
    """What all graphs will take: the largest decides, since they share memory; each adds a little of its own."""
    if not sizes:
        return 0
    before = _settled(runner.device)
    runner.capture(sizes[-1:])
    taken = _settled(runner.device) - before
    runner.graphs = None
    _settled(runner.device)
    return taken + len(sizes) * (taken // 16)


def _tokens_left(runner: ModelRunner, fraction: float, taken: int) -> int:
    """KV tokens that fit beside ``taken`` bytes; the same on every rank.

    Raises:
        ValueError: not even one block a kind fits.
    """
    total = devices.total_bytes(runner.device)
    room = int(total * fraction) - taken
    page = runner.engine.page_size
    mine = most_tokens(room, runner.arch, runner.engine, runner.cache.token_bytes)
    least = -_most(runner, -mine)
    if least < PROBE * page:
        raise ValueError(
            f"engine.mem_fraction_static={fraction} of {total / GB:.0f} GB leaves no KV cache beside "
            f"{taken / GB:.1f} GB of weights, buffers, activations and graphs: raise it, lower "
            "engine.chunked_prefill_size or engine.cuda_graph_max_bs, or use more GPUs"
        )
    return least


def most_tokens(room: int, arch: Arch, engine: EngineConfig, token_bytes: int) -> int:
    """The largest ``max_total_tokens`` whose KV cache fits into ``room`` bytes, in whole blocks.

    At most what every running request could use, where all layers slide and the cache stops growing.

    Args:
        token_bytes: of one token in one layer.
    """
    page = engine.page_size

    def size(blocks: int) -> int:
        kinds = layer_kinds(arch.windows, replace(engine, max_total_tokens=blocks * page))
        return sum(len(kind.layers) * (kind.num_blocks + 1) * page * token_bytes for kind in kinds)

    low, high = 0, max(room // (page * token_bytes), 1)
    if all(arch.windows):
        high = min(high, engine.max_running_requests * -(-(engine.context_length or arch.max_len) // page))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle - 1)
    return low * page


def _most(runner: ModelRunner, value: int) -> int:
    everyone = runner.groups.tp_cpu.all_gather(torch.tensor([value]))
    return int(everyone.max())


def _with_tokens(runner: ModelRunner, tokens: int) -> EngineConfig:
    page = runner.engine.page_size
    return replace(runner.engine, max_total_tokens=-(-tokens // page) * page)


def _settled(device: str) -> int:
    """Bytes taken on the GPU once everything has run and what is cached was given back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return devices.used_bytes(device)


def _log_memory(runner: ModelRunner, used: dict[str, int]) -> None:
    total = devices.total_bytes(runner.device)
    parts = ", ".join(f"{kind} {size / GB:.2f} GB" for kind, size in used.items())
    log.info(
        "rank %d: GPU memory %.1f GB: %s; %d KV tokens, contexts of up to %d",
        runner.groups.rank, total / GB, parts, runner.engine.max_total_tokens,
        context_length(runner.arch, runner.engine),
    )  # fmt: skip
