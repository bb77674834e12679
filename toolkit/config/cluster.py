"""``cluster.*``: where the processes run. What they must satisfy: ``launch/check_slurm.py``; docs/slurm.md teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config.options import opt


@dataclass(frozen=True)
class ClusterConfig:
    """Where the processes run."""

    launcher: Literal["local", "slurm"] = opt("local", "local: processes of this machine; slurm: a Slurm job")
    device: Literal["auto", "cpu", "cuda"] = opt("cpu", "what a rank computes on; auto: cuda where this host has one")
    gpus_per_node: int = opt(8, "ranks a node (GPUs, or CPU ranks where device=cpu)")
    gpu_memory_gb: float = opt(0.0, "memory of one GPU, 10^9 bytes; 0: not checked")
    cpu_threads_per_rank: int = opt(1, "torch threads of a CPU rank")
    port: int = opt(0, "first of the consecutive ports of a run; 0: a free range is looked for")
    results_dir: str = opt("results", "run folders are made under it")
    env: dict[str, str] = opt({}, "environment of every process, e.g. {NCCL_DEBUG: WARN}")
    role_env: dict[str, dict[str, str]] = opt(
        {}, "the same for one role: {rank: {...}, frontend: {...}, loadgen: {...}}"
    )
    network_interface: str = opt(
        "",
        "interface between ranks: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; empty: the route between nodes, NCCL's own",
    )
    # what is asked of Slurm
    partition: str = opt("", "Slurm partition; empty: the cluster's default")
    account: str = opt("", "Slurm account; empty: the user's default")
    qos: str = opt("", "quality of service; empty: the default")
    reservation: str = opt("", "Slurm reservation")
    constraint: str = opt("", "features that nodes must have")
    nodelist: str = opt("", "take these nodes, e.g. node[1-4]")
    exclude: str = opt("", "do not take these nodes")
    time_min: int = opt(60, "time limit of the job, minutes")
    signal_s: int = opt(120, "so many seconds before its limit the run is ended in order and kept")
    exclusive: bool = opt(True, "whole nodes: nobody else's job beside the ranks")
    mem: str | int = opt("0", "memory of a node (--mem); 0: all of it; empty: the cluster's default")
    cpus_per_node: int = opt(0, "CPUs of a node where exclusive=false; 0: one for each process and one to spare")
    gpus_by: Literal["gpus-per-node", "gres", "none"] = opt(
        "gpus-per-node",
        "how GPUs are asked for: --gpus-per-node, --gres=gpu, or not at all (whole-node sites); cpu: not at all",
    )
    gpu_type: str = opt("", "type in that request: h100 gives gpu:h100:8; empty: any")
    segment: int = opt(0, "nodes that must share an NVLink domain (--segment, Slurm 23.11 and later); 0: no matter")
    exclude_bad_nodes: bool = opt(False, "a node that fails the preflight is left out and the job submitted again")
    requeue: bool = opt(
        False, "after preemption, a lost node or the time limit the job starts again and the sweep goes on"
    )
    pools: dict[str, dict[str, Any]] = opt(
        {}, "pool -> cluster keys that differ for its nodes, e.g. {frontend: {partition: cpu}}: a heterogeneous job"
    )
    extra_sbatch: list[str] = opt([], "more sbatch options, e.g. [--comment=wideep, --mail-type=END]")
    extra_srun: list[str] = opt([], "more options of every job step's srun")
    # what is done on its nodes
    setup: list[str] = opt(
        [], "shell lines of the batch script before the run, e.g. [source /etc/profile.d/modules.sh]"
    )
    modules: list[str] = opt([], "environment modules to load (module load ...)")
    venv: str = opt("", "virtual environment that the batch script activates; empty: the Python that submits")
    container_image: str = opt(
        "", "image that ranks and frontend run in: a .sqsh, docker or .sif reference; empty: none"
    )
    container_mounts: list[str] = opt([], "SRC:DST[:FLAGS] in the container; the run folder and the toolkit are added")
    container_runtime: Literal["pyxis", "apptainer"] = opt(
        "pyxis", "pyxis: srun --container-image; apptainer: apptainer exec"
    )
    container_python: str = opt("python3", "interpreter inside the container")
    pack: Literal["auto", "allocation", "array"] = opt(
        "auto",
        "-m on Slurm: auto: an array with a task for each deployment, which runs all of its loads; allocation: one job "
        "for all runs, one after the other; array: a task for each run",
    )
    follow: bool = opt(True, "stay and show the job's progress; false: submit and return")
