"""Every key of ``cluster``, word by word: what it adds to the job script, a job step, a process's environment."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_launch_slurm import RUN, on_slurm
from toolkit.config.cluster import ClusterConfig
from toolkit.config.experiment import ExpConfig
from toolkit.launch import sbatch, srun
from toolkit.launch.launcher import Node, ProcessSpec, with_environment

PYXIS = {"container_image": "/i.sqsh"}
MOUNTS = f"{RUN}:{RUN},{srun.ROOT}:{srun.ROOT}"

# key -> (keys set, words that this adds; base: 4 nodes of 8 GPUs, whole)
ADDED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "device": ({"device": "cpu"}, []),
    "gpus_per_node": ({"gpus_per_node": 4}, ["#SBATCH --gpus-per-node=4", "#SBATCH --nodes=8"]),
    "env": ({"env": {"NCCL_DEBUG": "WARN"}}, ["NCCL_DEBUG=WARN"]),
    "role_env": ({"role_env": {"rank": {"A": "1"}, "loadgen": {"B": "2"}}}, ["A=1"]),
    "network_interface": ({"network_interface": "ib0"}, ["GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0"]),
    "partition": ({"partition": "gpu"}, ["#SBATCH --partition=gpu"]),
    "account": ({"account": "research"}, ["#SBATCH --account=research"]),
    "qos": ({"qos": "high"}, ["#SBATCH --qos=high"]),
    "reservation": ({"reservation": "bench"}, ["#SBATCH --reservation=bench"]),
    "constraint": ({"constraint": "ib&h100"}, ["#SBATCH --constraint='ib&h100'"]),
    "nodelist": ({"nodelist": "node[1-4]"}, ["#SBATCH --nodelist='node[1-4]'"]),
    "exclude": ({"exclude": "node[7,9]"}, ["#SBATCH --exclude='node[7,9]'"]),
    "time_min": ({"time_min": 90}, ["#SBATCH --time=90"]),
    "signal_s": ({"signal_s": 300}, ["#SBATCH --signal=B:USR2@300"]),
    "exclusive": ({"exclusive": False}, ["#SBATCH --cpus-per-task=26"]),
    "mem": ({"mem": "64G"}, ["#SBATCH --mem=64G"]),
    "cpus_per_node": ({"exclusive": False, "cpus_per_node": 24}, ["#SBATCH --cpus-per-task=24"]),
    "gpus_by": ({"gpus_by": "gres"}, ["#SBATCH --gres=gpu:8"]),
    "gpu_type": ({"gpu_type": "h100"}, ["#SBATCH --gpus-per-node=h100:8"]),
    "segment": ({"segment": 4}, ["#SBATCH --segment=4"]),
    "requeue": ({"requeue": True}, ["#SBATCH --requeue"]),
    "pools": ({"pools": {"agg": {"partition": "gpu"}}}, ["#SBATCH --partition=gpu"]),
    "extra_sbatch": ({"extra_sbatch": ["--comment=a b"]}, ["#SBATCH --comment='a b'"]),
    "extra_srun": ({"extra_srun": ["--network=sn_all"]}, ["--network=sn_all"]),
    "setup": ({"setup": ["source /etc/m.sh"]}, ["source /etc/m.sh"]),
    "modules": ({"modules": ["cuda/12.9", "ucx"]}, ["module load cuda/12.9 ucx"]),
    "venv": ({"venv": "/v"}, ["source /v/bin/activate", f"exec python -u -m toolkit.launch.inside {RUN}"]),
    "container_image": (
        PYXIS,
        ["--container-image=/i.sqsh", f"--container-mounts={MOUNTS}", "--no-container-mount-home", "env",
         f"PYTHONPATH={srun.ROOT}", "python3"],
    ),
    "container_mounts": (
        {**PYXIS, "container_mounts": ["/m:/m:ro"]},
        ["--container-image=/i.sqsh", f"--container-mounts={MOUNTS},/m:/m:ro", "--no-container-mount-home", "env",
         f"PYTHONPATH={srun.ROOT}", "python3"],
    ),
    "container_runtime": (
        {"container_image": "/i.sif", "container_runtime": "apptainer"},
        ["apptainer", "exec", "--nv", "--bind", MOUNTS, "/i.sif", "env", f"PYTHONPATH={srun.ROOT}", "python3"],
    ),
    "container_python": (
        {**PYXIS, "container_python": "/opt/python"},
        ["--container-image=/i.sqsh", f"--container-mounts={MOUNTS}", "--no-container-mount-home", "env",
         f"PYTHONPATH={srun.ROOT}", "/opt/python"],
    ),
}  # fmt: skip
# What is asked of nobody: where it is tested instead.
ELSEWHERE = {
    "launcher": "every test of a launcher",
    "gpu_memory_gb": "test_launch_plan.py",
    "cpu_threads_per_rank": "test_launch_plan.py",
    "port": "test_launch_slurm.py",
    "results_dir": "test_launch_cli.py",
    "exclude_bad_nodes": "test_launch_exclude.py, tests/slurm/test_bad_nodes.py",
    "pack": "test_launch_slurm.py",
    "follow": "tests/slurm/test_shapes.py",
}


def words(cfg: ExpConfig) -> list[str]:
    spec = with_environment([ProcessSpec("rank", 0, ("x",))], cfg, [Node("10.0.0.1", 20_000)])[0]
    options, command = srun.process_command(cfg.cluster, "rank", RUN, Path("/s.json"))
    step = srun.step("worker-0", srun.Placement(("n1",), 8), cfg.cluster, [*options, *command])
    return [*sbatch.script(cfg, [[RUN]]).splitlines(), *step, *(f"{name}={value}" for name, value in spec.env.items())]


@pytest.mark.parametrize("key", ADDED)
def test_a_key_adds_these_words(key: str) -> None:
    keys, added = ADDED[key]
    before = words(on_slurm())
    assert [word for word in words(on_slurm(**keys)) if word not in before] == added


def test_what_is_not_asked_for_is_not_there() -> None:
    assert not any("gpu" in word for word in words(on_slurm(device="cpu")) if "#SBATCH" in word)
    assert not any("gpu" in word for word in words(on_slurm(gpus_by="none")) if "#SBATCH" in word)
    assert not any("exclusive" in word for word in words(on_slurm(exclusive=False)))
    assert not any("container" in word or "apptainer" in word for word in words(on_slurm()))
    assert "#SBATCH --no-requeue" in words(on_slurm())


def test_no_key_is_forgotten() -> None:
    assert set(ADDED) | set(ELSEWHERE) == {field.name for field in fields(ClusterConfig)}
