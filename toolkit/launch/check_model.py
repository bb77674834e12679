"""What depends on the model's shape: degrees, memory, placement of experts, context length.

Waits until the model's folder is there. The rules themselves are the engine's: ``engine/arch_check.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import psutil

from toolkit.config.experiment import ExpConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.arch import Arch, context_length, read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.dims import ParallelDims
from toolkit.engine.memory import memory_by_kind
from toolkit.launch.pools import Pool, named, worker_pools

GB = 10**9
WORKSPACE = 0.9  # share of a GPU's memory for weights and KV cache; the rest is activations and buffers


def will_build(model: ModelConfig) -> bool:
    """True when the model's folder has yet to be built."""
    return bool(model.build) and not (Path(model.path) / "config.json").is_file()


def check_model(cfg: ExpConfig) -> list[str]:
    """What depends on the model's shape: degrees, memory, context length. Also run after a model was built."""
    try:
        arch = read_arch(cfg.model)
    except ValueError as error:
        return [str(error)]
    errors: list[str] = []
    for pool in worker_pools(cfg):
        view, dims = pool.view(cfg), ParallelDims.of(pool.parallel)
        wrong = check(arch, dims, pool.engine)
        errors += named(pool, wrong or _check_model(view, pool, arch, dims))
    return errors or _host_memory(cfg, arch)


def _check_model(view: ExpConfig, pool: Pool, arch: Arch, dims: ParallelDims) -> Iterator[str]:
    yield from _memory(view, arch, dims)
    yield from _context(view, arch, pool.name == "prefill")
    yield from _experts(view, arch, dims)


def memory(cfg: ExpConfig) -> dict[str, int]:
    """Bytes one rank needs, by kind; empty when the shape is not known (yet) or does not fit the degrees."""
    if will_build(cfg.model):
        return {}
    try:
        arch, dims = read_arch(cfg.model), ParallelDims.of(cfg.parallel)
    except ValueError:
        return {}
    if check(arch, dims, cfg.engine):
        return {}
    return memory_by_kind(arch, dims, cfg.engine, cfg.model.dtype, cfg.cluster.device)


def weights(cfg: ExpConfig) -> int:
    return sum(size for kind, size in memory(cfg).items() if "kv" not in kind)


def _memory(cfg: ExpConfig, arch: Arch, dims: ParallelDims) -> Iterator[str]:
    by_kind = memory_by_kind(arch, dims, cfg.engine, cfg.model.dtype, cfg.cluster.device)
    rank = sum(by_kind.values())
    detail = _rank_memory(by_kind)
    way_out = "more ranks, a larger parallel.ep_size, or a smaller engine.max_total_tokens"
    c = cfg.cluster
    if c.device == "cuda" and c.gpu_memory_gb and rank > WORKSPACE * c.gpu_memory_gb * GB:
        yield (
            f"cluster.gpu_memory_gb={c.gpu_memory_gb:g}: weights and KV cache need {detail}, more than the "
            f"{WORKSPACE:.0%} of a GPU that is theirs ({WORKSPACE * c.gpu_memory_gb:.0f} GB): use {way_out}"
        )


def _host_memory(cfg: ExpConfig, arch: Arch) -> list[str]:
    """What all CPU ranks of this machine need together."""
    if (cfg.cluster.device, cfg.cluster.launcher) != ("cpu", "local"):
        return []
    ranks, needed, detail = 0, 0, ""
    for pool in worker_pools(cfg):
        dims = ParallelDims.of(pool.parallel)
        by_kind = memory_by_kind(arch, dims, pool.engine, cfg.model.dtype, cfg.cluster.device)
        ranks += dims.tp_size * pool.workers
        needed += sum(by_kind.values()) * dims.tp_size * pool.workers
        detail = detail or _rank_memory(by_kind)
    total = psutil.virtual_memory().total
    if needed <= total:
        return []
    sentence = (
        f"{ranks} ranks on this machine need {needed / GB:.1f} GB, {detail}, and it has "
        f"{total / GB:.1f} GB: use a smaller model (model=tiny) or a smaller engine.max_total_tokens"
    )
    return [sentence]


def _rank_memory(by_kind: dict[str, int]) -> str:
    largest = max(by_kind, key=lambda kind: by_kind[kind])
    return f"{sum(by_kind.values()) / GB:.1f} GB a rank ({largest} {by_kind[largest] / GB:.1f})"


def _experts(cfg: ExpConfig, arch: Arch, dims: ParallelDims) -> Iterator[str]:
    """Balancing that this machine or device cannot do, and a placement that does not fit the model."""
    engine = cfg.engine
    if engine.enable_eplb and importlib.util.find_spec("scipy") is None:
        yield "engine.enable_eplb=true needs scipy: pip install 'wideep-toolkit[eplb]' (numba, too, to plan fast)"
    mode = engine.expert_distribution_recorder_mode
    if mode == "per_token" and cfg.cluster.device == "cuda" and not engine.disable_cuda_graph:
        yield (
            "engine.expert_distribution_recorder_mode=per_token sees no token inside a CUDA graph: use "
            "engine.disable_cuda_graph=true with it, or per_pass"
        )
    if engine.init_expert_location != "trivial" and arch.moe_layers:
        from toolkit.engine.eplb.formats import read_placement  # numpy, and torch for a .pt file

        slots, groups = arch.slots(engine), arch.expert_groups
        try:
            read_placement(engine.init_expert_location, arch.moe_layers, arch.num_experts, slots, dims.ep_size, groups)
        except ValueError as error:
            yield f"engine.{error}"


def _context(cfg: ExpConfig, arch: Arch, prompt_only: bool) -> Iterator[str]:
    """``prompt_only``: the worker needs to hold a prompt and one token, not the answer."""
    prompt = cfg.load.isl if cfg.load.dataset == "random" else 1
    output = 1 if prompt_only else cfg.load.osl
    sized_later = cfg.cluster.device == "cuda" and cfg.engine.mem_fraction_static  # by what the GPU has left
    own = cfg.engine.context_length or arch.max_len
    limit = own if sized_later else context_length(arch, cfg.engine)
    if prompt + output > limit:
        rest = "one token" if prompt_only else f"load.osl={cfg.load.osl}"
        isl = f"load.isl={prompt} + " if cfg.load.dataset == "random" else "a prompt + "
        yield (
            f"{isl}{rest} is longer than the {limit} tokens a request can have (the model's "
            f"{arch.max_len}, engine.context_length={cfg.engine.context_length or 'the model’s'}, KV cache "
            f"engine.max_total_tokens={cfg.engine.max_total_tokens}): use a shorter load or a larger limit"
        )
