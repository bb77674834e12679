"""Everything that can be known to be wrong before a process is started or a node is taken.

Each function returns sentences (field, value, rule, way out); ``check`` returns all of them, so that a user
corrects everything at once. No torch, and nothing is changed. Read next: ``run.py``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from toolkit.config.cluster import ClusterConfig
from toolkit.config.deploy import DeployConfig
from toolkit.config.experiment import ExpConfig
from toolkit.config.health import HealthConfig
from toolkit.config.model import ModelConfig
from toolkit.engine import arch as shapes
from toolkit.engine.dims import ParallelDims
from toolkit.engine.frontend.router import ROUTERS
from toolkit.launch import ports, provenance, queue
from toolkit.launch.check_disagg import check_disagg
from toolkit.launch.check_slurm import check_slurm
from toolkit.launch.plan import num_ports, pools
from toolkit.launch.pools import Pool, worker_pools
from toolkit.loadgen.options import check_load
from toolkit.registry import unknown

BUILDS = ("smollm2_moe",)
# Names that the engine's registries offer; those that need torch are not asked here (a test compares them).
NAMES = {
    "engine.backend": ("native",),
    "engine.attention_backend": ("auto", "fa3", "flash_mla", "sdpa", "varlen"),
    "engine.moe_a2a_backend": ("allgather", "all_to_all", "deepep", "nvlink"),
    "engine.moe_runner_backend": ("auto", "torch", "grouped_mm", "deep_gemm"),
    "deploy.router": tuple(ROUTERS),
}
GB = 10**9
WORKSPACE = 0.9  # share of a GPU's memory for weights and KV cache; the rest is activations and buffers


def will_build(model: ModelConfig) -> bool:
    """True when the model's folder has yet to be built."""
    return bool(model.build) and not (Path(model.path) / "config.json").is_file()


def check(cfg: ExpConfig) -> list[str]:
    """All errors of ``cfg``; empty when it can run. Rules about the model wait until its folder is built."""
    errors = [
        *_cluster(cfg),
        *_gpu_backends(cfg),
        *_model(cfg.model),
        *_deploy(cfg.deploy),
        *_health(cfg.health),
        *(f"load.{error}" for error in check_load(cfg.load)),
    ]
    try:
        found = worker_pools(cfg)
    except ValueError as error:
        return [*errors, str(error)]
    sound = True
    for pool in found:
        view = pool.view(cfg)
        errors += named(pool, _names(view))
        try:
            errors += named(pool, _nodes(cfg.cluster, ParallelDims.of(pool.parallel)))
        except ValueError as error:
            errors += named(pool, [str(error)])
            sound = False
    if cfg.deploy.mode == "disagg":
        errors += check_disagg(cfg)
    if not sound:
        return errors
    errors += _loadgen(cfg)
    if cfg.cluster.launcher == "local":
        errors += _ports(cfg)
    elif cfg.cluster.gpus_per_node > 0:
        errors += check_slurm(cfg, max(_weights(pool.view(cfg)) for pool in found))
    return errors if will_build(cfg.model) else [*errors, *check_model(cfg)]


def check_model(cfg: ExpConfig) -> list[str]:
    """What depends on the model's shape: degrees, memory, context length. Also run after a model was built."""
    try:
        arch = shapes.read_arch(cfg.model)
    except ValueError as error:
        return [str(error)]
    errors: list[str] = []
    for pool in worker_pools(cfg):
        view, dims = pool.view(cfg), ParallelDims.of(pool.parallel)
        wrong = shapes.check(arch, dims, pool.engine)
        errors += named(pool, wrong or _check_model(view, pool, arch, dims))
    return errors or _host_memory(cfg, arch)


def _check_model(view: ExpConfig, pool: Pool, arch: shapes.Arch, dims: ParallelDims) -> Iterator[str]:
    yield from _memory(view, arch, dims)
    yield from _context(view, arch, pool.name == "prefill")
    yield from _experts(view, arch, dims)


def memory(cfg: ExpConfig) -> dict[str, int]:
    """Bytes one rank needs, by kind; empty when the shape is not known (yet) or does not fit the degrees."""
    if will_build(cfg.model):
        return {}
    try:
        arch, dims = shapes.read_arch(cfg.model), ParallelDims.of(cfg.parallel)
    except ValueError:
        return {}
    if shapes.check(arch, dims, cfg.engine):
        return {}
    return shapes.memory_by_kind(arch, dims, cfg.engine, cfg.model.dtype, cfg.cluster.device)


def _weights(cfg: ExpConfig) -> int:
    return sum(size for kind, size in memory(cfg).items() if "kv" not in kind)


def named(pool: Pool, errors: Iterable[str]) -> list[str]:
    """``errors`` about keys of one pool, with the pool's own names for these keys."""
    return [
        f"{pool.field}{error}"
        if error.startswith(("parallel.", "engine."))
        else f"{pool.name} worker: {error}"
        if pool.field
        else error
        for error in errors
    ]


def _names(cfg: ExpConfig) -> Iterator[str]:
    for field, known in NAMES.items():
        group, _, key = field.partition(".")
        value = getattr(getattr(cfg, group), key)
        if value not in known:
            yield unknown(field, value, list(known))


def _cluster(cfg: ExpConfig) -> Iterator[str]:
    c = cfg.cluster
    if not cfg.exp or "/" in cfg.exp or cfg.exp.startswith("."):
        yield f"exp={cfg.exp!r} must be a folder name without / and not start with a dot: it names results/<exp>/"
    if c.launcher == "slurm" and not cfg.dry_run and not cfg.emit and not queue.here():
        yield (
            "cluster.launcher=slurm: sbatch or srun is not installed here: run this on a login node, or use "
            "emit=sbatch for a script to take there, dry_run=true to see the plan, cluster=local to run here"
        )
    if c.cpu_threads_per_rank < 1:
        yield f"cluster.cpu_threads_per_rank={c.cpu_threads_per_rank} must be at least 1"
    if c.device == "cuda" and c.launcher == "local" and not provenance.gpus():
        yield "cluster.device=cuda, but nvidia-smi finds no GPU on this machine: use cluster.device=cpu"
    folder = Path(c.results_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield f"cluster.results_dir={c.results_dir} cannot be made or written to ({folder}): name another folder"


def _gpu_backends(cfg: ExpConfig) -> Iterator[str]:
    """Backends that run on GPUs alone, where there are none or the model's type is not theirs."""
    for key, names, other in (
        ("moe_a2a_backend", ("deepep", "nvlink"), "all_to_all"),
        ("moe_runner_backend", ("deep_gemm",), "auto"),
    ):
        name = getattr(cfg.engine, key)
        if name not in names:
            continue
        if cfg.cluster.device == "cpu":
            yield f"engine.{key}={name} runs on GPUs, but cluster.device=cpu: use engine.{key}={other}"
        elif cfg.model.dtype == "float32":
            yield f"engine.{key}={name} works in bfloat16, but model.dtype=float32: use bfloat16, or {key}={other}"


def _nodes(cluster: ClusterConfig, dims: ParallelDims) -> Iterator[str]:
    per_node, ranks = cluster.gpus_per_node, dims.tp_size
    if per_node < 1:
        yield f"cluster.gpus_per_node={per_node} must be at least 1"
    elif cluster.launcher == "local":
        if cluster.device == "cuda" and ranks > per_node:
            yield (
                f"parallel.tp_size={ranks} needs {ranks} GPUs on this machine, cluster.gpus_per_node={per_node}: "
                f"use tp_size <= {per_node} or cluster=slurm"
            )
    elif ranks > per_node and ranks % per_node:
        yield (
            f"parallel.tp_size={ranks} does not fill nodes of cluster.gpus_per_node={per_node} evenly: "
            f"use a multiple of {per_node}"
        )


def _loadgen(cfg: ExpConfig) -> Iterator[str]:
    if cfg.cluster.launcher == "local" or cfg.load.nodes == 1 or cfg.cluster.gpus_per_node < 1:
        return
    have = sum(pool.num_nodes for pool in pools(cfg))
    if cfg.load.nodes > have:
        yield f"load.nodes={cfg.load.nodes} is more than the {have} nodes of the deployment: use at most {have}"
    if cfg.deploy.host in ("127.0.0.1", "localhost", "::1"):
        yield (
            f"deploy.host={cfg.deploy.host} is not reached from other nodes, which load.nodes={cfg.load.nodes} sends "
            "from: use deploy.host=0.0.0.0, with deploy.api_key_env on a shared network, or load.nodes=1"
        )


def _ports(cfg: ExpConfig) -> Iterator[str]:
    base, count = cfg.cluster.port, num_ports(cfg)
    if base == 0:
        return
    if not 1024 <= base <= 65536 - count:
        yield f"cluster.port={base}: the run takes {count} ports from there: use 1024 to {65536 - count}, or 0"
        return
    for port in range(base, base + count):
        if not ports.is_free(port):
            yield (
                f"cluster.port={base}: port {port} is in use{ports.owner(port)}: end that process, choose a base with "
                f"{count} free ports, or use cluster.port=0"
            )


def _model(model: ModelConfig) -> Iterator[str]:
    folder = Path(model.path)
    if model.build and model.build not in BUILDS:
        yield unknown("model.build", model.build, list(BUILDS))
    if model.build and not model.path:
        yield f"model.build={model.build} needs model.path, the folder to build into"
    if model.hf_config is not None and model.load_format != "dummy":
        yield (
            f"model.hf_config is given, but model.load_format={model.load_format} reads weights from a folder: use "
            "load_format=dummy, or hf_config=null and model.path"
        )
    if will_build(model):
        return
    if model.load_format == "auto" and folder.is_dir() and not any(folder.glob("*.safetensors")):
        yield f"model.path={model.path} has no *.safetensors: give the folder with the weights, or load_format=dummy"
    if model.tokenizer != "bytes" and not any(
        (Path(model.tokenizer) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        yield (
            f"model.tokenizer={model.tokenizer} has no tokenizer.json: give a folder with a tokenizer, or `bytes` "
            "(one token a byte)"
        )


def _deploy(deploy: DeployConfig) -> Iterator[str]:
    if deploy.api_key_env and not os.environ.get(deploy.api_key_env):
        yield (
            f"deploy.api_key_env={deploy.api_key_env}: that environment variable is not set: export it, "
            "or leave api_key_env empty"
        )


def _health(health: HealthConfig) -> Iterator[str]:
    for name in ("stall_s", "max_clock_offset_ms"):
        if getattr(health, name) <= 0:
            yield f"health.{name}={getattr(health, name):g} must be positive"
    for name in ("sample_interval_s", "min_disk_gb"):
        if getattr(health, name) < 0:
            yield f"health.{name}={getattr(health, name):g} is negative; use 0 for none"


def _memory(cfg: ExpConfig, arch: shapes.Arch, dims: ParallelDims) -> Iterator[str]:
    by_kind = shapes.memory_by_kind(arch, dims, cfg.engine, cfg.model.dtype, cfg.cluster.device)
    rank = sum(by_kind.values())
    detail = _rank_memory(by_kind)
    way_out = "more ranks, a larger parallel.ep_size, or a smaller engine.max_total_tokens"
    c = cfg.cluster
    if c.device == "cuda" and c.gpu_memory_gb and rank > WORKSPACE * c.gpu_memory_gb * GB:
        yield (
            f"cluster.gpu_memory_gb={c.gpu_memory_gb:g}: weights and KV cache need {detail}, more than the "
            f"{WORKSPACE:.0%} of a GPU that is theirs ({WORKSPACE * c.gpu_memory_gb:.0f} GB): use {way_out}"
        )


def _host_memory(cfg: ExpConfig, arch: shapes.Arch) -> list[str]:
    """What all CPU ranks of this machine need together."""
    if (cfg.cluster.device, cfg.cluster.launcher) != ("cpu", "local"):
        return []
    ranks, needed, detail = 0, 0, ""
    for pool in worker_pools(cfg):
        dims = ParallelDims.of(pool.parallel)
        by_kind = shapes.memory_by_kind(arch, dims, pool.engine, cfg.model.dtype, cfg.cluster.device)
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


def _experts(cfg: ExpConfig, arch: shapes.Arch, dims: ParallelDims) -> Iterator[str]:
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


def _context(cfg: ExpConfig, arch: shapes.Arch, prompt_only: bool) -> Iterator[str]:
    """``prompt_only``: the worker needs to hold a prompt and one token, not the answer."""
    prompt = cfg.load.isl if cfg.load.dataset == "random" else 1
    output = 1 if prompt_only else cfg.load.osl
    sized_later = cfg.cluster.device == "cuda" and cfg.engine.mem_fraction_static  # by what the GPU has left
    own = cfg.engine.context_length or arch.max_len
    limit = own if sized_later else shapes.context_length(arch, cfg.engine)
    if prompt + output > limit:
        rest = "one token" if prompt_only else f"load.osl={cfg.load.osl}"
        isl = f"load.isl={prompt} + " if cfg.load.dataset == "random" else "a prompt + "
        yield (
            f"{isl}{rest} is longer than the {limit} tokens a request can have (the model's "
            f"{arch.max_len}, engine.context_length={cfg.engine.context_length or 'the model’s'}, KV cache "
            f"engine.max_total_tokens={cfg.engine.max_total_tokens}): use a shorter load or a larger limit"
        )
