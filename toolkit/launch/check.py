"""Everything that can be known to be wrong before a process is started or a node is taken.

Each function returns sentences (field, value, rule, way out); ``check`` returns all of them, so that a user
corrects everything at once. No torch, and nothing is changed. Read next: ``run.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from toolkit.config.cluster import ClusterConfig
from toolkit.config.deploy import DeployConfig
from toolkit.config.experiment import ExpConfig
from toolkit.config.health import HealthConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.frontend.router import ROUTERS
from toolkit.launch import ports, provenance, queue
from toolkit.launch.check_disagg import check_disagg
from toolkit.launch.check_model import check_model, weights, will_build
from toolkit.launch.check_slurm import check_slurm
from toolkit.launch.plan import num_ports, pools
from toolkit.launch.pools import named, worker_pools
from toolkit.loadgen.options import check_load
from toolkit.registry import unknown

BUILDS = ("smollm2_moe",)
# Names that the engine's registries offer; those that need torch are not asked here (a test compares them).
NAMES = {
    "engine.backend": ("native",),
    "engine.attention_backend": ("auto", "fa3", "flash_mla", "sdpa", "triton", "varlen"),
    "engine.moe_a2a_backend": ("allgather", "all_to_all", "deepep", "nvlink"),
    "engine.moe_runner_backend": ("auto", "torch", "grouped_mm", "deep_gemm", "triton"),
    "deploy.router": tuple(ROUTERS),
}


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
        errors += check_slurm(cfg, max(weights(pool.view(cfg)) for pool in found))
    return errors if will_build(cfg.model) else [*errors, *check_model(cfg)]


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
        ("moe_runner_backend", ("deep_gemm", "triton"), "auto"),
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
    if not 0 <= deploy.api_servers <= 64:
        yield f"deploy.api_servers={deploy.api_servers} must be 0 to 64; 0 suits the GPUs"
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
