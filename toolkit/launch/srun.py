"""The command line of a job step. Pure: strings from strings, compared word by word in tests.

Steps share what the job has (``--overlap``, ``--overcommit``, ``--mem=0``): ranks, frontend and load generator run side
by side, and the ranks bind themselves to GPUs by their local rank. Read next: ``slurm.py``, which starts them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.config.cluster import ClusterConfig
from toolkit.launch.launcher import ProcessSpec

ROOT = Path(__file__).resolve().parents[2]  # what has to be importable inside a container
ENGINE_ROLES = ("rank", "frontend")  # what runs in the container; the load generator measures from the host


@dataclass(frozen=True)
class Placement:
    """Where a step's tasks go: ``per_node`` tasks on each of ``nodes`` (Slurm's names), of one component of the job."""

    nodes: tuple[str, ...]
    per_node: int
    component: int | None = None  # of a heterogeneous job


def step(name: str, where: Placement, cluster: ClusterConfig, command: Sequence[str]) -> list[str]:
    """``srun`` of ``command`` as one job step called ``name``."""
    component = [] if where.component is None else [f"--het-group={where.component}"]
    return [
        "srun",
        f"--job-name={name}",
        *component,
        f"--nodes={len(where.nodes)}",
        f"--nodelist={','.join(where.nodes)}",
        f"--ntasks={len(where.nodes) * where.per_node}",
        f"--ntasks-per-node={where.per_node}",
        "--overlap",
        "--overcommit",
        "--mem=0",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=0",  # the launcher says who dies with whom, after it has said who died first
        "--export=ALL",
        *cluster.extra_srun,
        *command,
    ]


def process_command(cluster: ClusterConfig, role: str, run_dir: Path, file: Path) -> tuple[list[str], list[str]]:
    """(options of srun, command) to run the processes listed in ``file``, in the container where their role has one."""
    if not cluster.container_image or role not in ENGINE_ROLES:
        return [], [*python(), "-m", "toolkit.launch.rank", str(file)]
    mounts = [f"{run_dir}:{run_dir}", f"{ROOT}:{ROOT}", *cluster.container_mounts]
    inside = ["env", f"PYTHONPATH={ROOT}", cluster.container_python, "-m", "toolkit.launch.rank", str(file)]
    if cluster.container_runtime == "pyxis":
        return [
            f"--container-image={cluster.container_image}",
            f"--container-mounts={','.join(mounts)}",
            "--no-container-mount-home",
        ], inside
    gpu = ["--nv"] if cluster.device == "cuda" else []
    return [], ["apptainer", "exec", *gpu, "--bind", ",".join(mounts), cluster.container_image, *inside]


def engine_python(cluster: ClusterConfig) -> str:
    """The interpreter of ranks and frontend, which may be inside a container."""
    return cluster.container_python if cluster.launcher == "slurm" and cluster.container_image else sys.executable


def python() -> list[str]:
    """The interpreter of what runs on the nodes outside of any container: the launcher's own, from a shared disk."""
    return [sys.executable]


def groups(specs: Sequence[ProcessSpec]) -> list[tuple[str, list[ProcessSpec]]]:
    """``specs`` by job step: those of one ``group`` that have the same number of tasks on each of their nodes."""
    by_group: dict[str, list[ProcessSpec]] = {}
    for spec in specs:
        by_group.setdefault(spec.group or spec.name, []).append(spec)
    steps = []
    for name, members in by_group.items():
        counts = {node: sum(s.node == node for s in members) for node in {s.node for s in members}}
        sizes = sorted(set(counts.values()), reverse=True)
        for size in sizes:
            part = [s for s in members if counts[s.node] == size]
            steps.append((name if size == sizes[0] else f"{name}-of-{size}", part))
    return steps
