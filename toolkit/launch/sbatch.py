"""The job script: what is asked of Slurm, and the one command that runs on the first node. Pure: text from config.

submitit writes the options (its names and checks), with three additions it has no word for: components of a
heterogeneous job, ``--segment``, and a signal to the batch script alone. The command reads the run folder's
config.yaml; nothing is pickled, so that the script can be read, kept, and submitted by hand again.
Read next: ``submit.py``.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.config.cluster import ClusterConfig
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping, to_mapping
from toolkit.launch.interrupts import ENDS_SOON
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.plan import FRONTEND, PoolPlan, api_servers, pools
from toolkit.launch.srun import ROOT

LOG = "logs/slurm-%j.log"
ARRAY_LOG = "logs/slurm-%A_%a.log"
NEXT_TASK = "--next-task"  # between the run folders of two tasks of an array


def script(cfg: ExpConfig, tasks: Sequence[Sequence[Path]], excluding: Sequence[str] = ()) -> str:
    """The script of a job whose every task runs its run folders one after the other; several tasks are an array.

    Args:
        cfg: of any of the runs: all ask the same of Slurm.
        excluding: nodes that no component of the job may have, beside those of ``cluster.exclude``.
    """
    parts = [_header(cfg, pool, tasks, excluding) for pool in pools(cfg)]
    head = "\n#SBATCH hetjob\n".join(parts)
    return f"#!/bin/bash\n{head}\n\n{_body(cfg.cluster, tasks)}"


def pool_cluster(cfg: ExpConfig, pool: PoolPlan) -> ClusterConfig:
    """The cluster as ``pool`` sees it: ``cluster.pools``' keys replaced."""
    return from_mapping({**to_mapping(cfg.cluster), **cfg.cluster.pools.get(pool.name, {})}, ClusterConfig)


def allocation_key(cfg: ExpConfig) -> Any:
    """Equal for experiments that can run in one allocation, one after the other."""
    return to_mapping(cfg.cluster) | {"nodes": [dataclasses.astuple(pool) for pool in pools(cfg)]}


def _header(cfg: ExpConfig, pool: PoolPlan, tasks: Sequence[Sequence[Path]], excluding: Sequence[str]) -> str:
    """The #SBATCH lines of one component."""
    from submitit.slurm.slurm import _make_sbatch_string

    cluster = pool_cluster(cfg, pool)
    cluster = dataclasses.replace(cluster, exclude=",".join(filter(None, [cluster.exclude, *excluding])))
    text = _make_sbatch_string(
        command="", folder=tasks[0][0] / STATE_DIR, use_srun=False, wckey=None, stderr_to_stdout=True,
        additional_parameters=_additional(cluster, pool, tasks), **_parameters(cfg, cluster, pool),
    )  # fmt: skip
    return "\n".join(line for line in text.splitlines() if line.startswith("#SBATCH"))


def _parameters(cfg: ExpConfig, cluster: ClusterConfig, pool: PoolPlan) -> dict[str, Any]:
    """What submitit has a word for; what is not asked for is None."""
    gpus = cluster.gpus_per_node if cluster.device == "cuda" and pool.name != FRONTEND else 0
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    tasks = cluster.gpus_per_node if pool.name != FRONTEND else 1
    servers = api_servers(cfg) if pool.first_node == 0 else 1
    beside = 2 if servers == 1 else 2 + servers  # frontend, load generator, API servers
    return {
        "job_name": cfg.exp,
        "partition": cluster.partition or None,
        "account": cluster.account or None,
        "qos": cluster.qos or None,
        "time": cluster.time_min,
        "nodes": pool.num_nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": None if cluster.exclusive else cluster.cpus_per_node or tasks + beside,
        "mem": str(cluster.mem) or None,
        "gpus_per_node": f"{kind}{gpus}" if gpus and cluster.gpus_by == "gpus-per-node" else None,
        "gres": f"gpu:{kind}{gpus}" if gpus and cluster.gpus_by == "gres" else None,
        "exclusive": cluster.exclusive or None,
        "constraint": cluster.constraint or None,
        "nodelist": cluster.nodelist or None,
        "exclude": cluster.exclude or None,
    }


def _additional(cluster: ClusterConfig, pool: PoolPlan, tasks: Sequence[Sequence[Path]]) -> dict[str, Any]:
    """What it has none for."""
    array = len(tasks) > 1
    options: dict[str, Any] = {"output": str(tasks[0][0] / (ARRAY_LOG if array else LOG))}
    options["signal"] = f"B:{ENDS_SOON.name.removeprefix('SIG')}@{cluster.signal_s}"
    options["requeue" if cluster.requeue else "no-requeue"] = True
    if array:
        options["array"] = f"0-{len(tasks) - 1}"
    if cluster.reservation:
        options["reservation"] = cluster.reservation
    if cluster.segment and pool.name != FRONTEND:
        options["segment"] = cluster.segment
    for word in cluster.extra_sbatch:
        name, equals, value = word.removeprefix("--").partition("=")
        options[name] = value if equals else True
    return options


def _body(cluster: ClusterConfig, tasks: Sequence[Sequence[Path]]) -> str:
    """What runs on the first node, with the toolkit importable and the user's modules and environment."""
    lines = [*cluster.setup]
    lines += [f"module load {shlex.join(cluster.modules)}"] if cluster.modules else []
    lines += [f"source {shlex.quote(cluster.venv)}/bin/activate"] if cluster.venv else []
    lines += [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    python = "python" if cluster.venv else shlex.quote(sys.executable)
    words = f" {NEXT_TASK} ".join(shlex.join(map(str, run_dirs)) for run_dirs in tasks)
    lines += [f"exec {python} -u -m toolkit.launch.inside {words}", ""]
    return "\n".join(lines)
