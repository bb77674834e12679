"""What is asked of Slurm, word by word: job scripts, job steps, who shares an allocation. The rest needs a real one."""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch_experiment import experiment
from toolkit.config.cluster import ClusterConfig
from toolkit.config.experiment import ExpConfig
from toolkit.config.load import LoadConfig
from toolkit.config.mapping import from_mapping
from toolkit.launch import check_slurm, estimate, inside, node, ports, queue, sbatch, srun
from toolkit.launch.launcher import Node, ProcessSpec, with_environment
from toolkit.launch.plan import AGG, FRONTEND, plan, pools
from toolkit.launch.slurm import Allocation
from toolkit.launch.standing import may_share
from toolkit.launch.submit import Experiment, groups
from toolkit.launch.watch import RunFailed

RUN = Path("/shared/results/dep16/20260101-120000")
FOUR_BY_EIGHT = {"tp_size": 32, "dp_size": 32, "ep_size": 8, "moe_dp_size": 4, "enable_dp_attention": True}


def on_slurm(parallel: dict[str, Any] | None = None, **cluster: Any) -> ExpConfig:
    keys = {"launcher": "slurm", "device": "cuda", "gpus_per_node": 8, **cluster}
    return experiment(cluster=keys, parallel=parallel or FOUR_BY_EIGHT)


def lines(cfg: ExpConfig, *tasks: list[Path], excluding: Sequence[str] = ()) -> list[str]:
    return sbatch.script(cfg, tasks or [[RUN]], excluding).splitlines()


# --- the job script ---------------------------------------------------------------------------------


def test_a_script_word_by_word() -> None:
    cfg = on_slurm(
        partition="gpu", account="research", qos="high", reservation="bench", constraint="ib", exclude="node9",
        time_min=90, signal_s=60, gpu_type="h100", extra_sbatch=["--comment=a b", "--contiguous"],
        setup=["source /etc/profile.d/modules.sh"], modules=["cuda/12.9", "ucx"], venv="/shared/venv", requeue=True,
    )  # fmt: skip
    assert lines(cfg) == [
        "#!/bin/bash",
        "#SBATCH --account=research",
        "#SBATCH --comment='a b'",
        "#SBATCH --constraint=ib",
        "#SBATCH --contiguous",
        "#SBATCH --exclude=node9",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=h100:8",
        "#SBATCH --job-name=test",
        "#SBATCH --mem=0",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={RUN}/logs/slurm-%j.log",
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=high",
        "#SBATCH --requeue",
        "#SBATCH --reservation=bench",
        "#SBATCH --signal=B:USR2@60",
        "#SBATCH --time=90",
        "",
        "source /etc/profile.d/modules.sh",
        "module load cuda/12.9 ucx",
        "source /shared/venv/bin/activate",
        f"export PYTHONPATH={srun.ROOT}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"exec python -u -m toolkit.launch.inside {RUN}",
    ]


def test_shared_nodes_say_how_many_cpus_and_gpus_by_gres() -> None:
    text = lines(on_slurm(exclusive=False, gpus_by="gres", mem="64G"))
    assert "#SBATCH --gres=gpu:8" in text and "#SBATCH --mem=64G" in text
    assert "#SBATCH --cpus-per-task=26" in text, "8 ranks, frontend, load generator, 16 API servers"
    assert not any("exclusive" in line or "gpus-per-node" in line for line in text)
    assert "#SBATCH --cpus-per-task=24" in lines(on_slurm(exclusive=False, cpus_per_node=24))
    assert not any("gpu" in line for line in lines(on_slurm(gpus_by="none")) if line.startswith("#SBATCH"))
    assert not any("gpu" in line for line in lines(on_slurm(device="cpu")) if line.startswith("#SBATCH"))


def test_a_rack_of_gb200_is_one_segment() -> None:
    parallel = {**FOUR_BY_EIGHT, "tp_size": 72, "dp_size": 72, "moe_dp_size": 9}
    text = lines(on_slurm(parallel, gpus_per_node=4, segment=18))
    assert "#SBATCH --nodes=18" in text and "#SBATCH --segment=18" in text and "#SBATCH --gpus-per-node=4" in text


def test_a_pool_of_its_own_makes_a_heterogeneous_job() -> None:
    cfg = on_slurm(partition="gpu", pools={FRONTEND: {"partition": "cpu", "mem": "16G"}})
    first, _, second = "\n".join(lines(cfg)).partition("#SBATCH hetjob\n")
    assert "--partition=cpu" in first and "--nodes=1" in first and "--mem=16G" in first and "gpus" not in first
    assert "--partition=gpu" in second and "--nodes=4" in second and "--gpus-per-node=8" in second


def test_nodes_to_be_left_out_are_left_out_of_every_component() -> None:
    cfg = on_slurm(exclude="node9", pools={FRONTEND: {"exclude": "cpu1"}})
    found = [line for line in lines(cfg, excluding=["node2", "node3"]) if "exclude" in line]
    assert found == ["#SBATCH --exclude=cpu1,node2,node3", "#SBATCH --exclude=node9,node2,node3"]


def test_an_array_gives_each_task_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [RUN.with_name("b"), RUN.with_name("c")]
    text = lines(on_slurm(), [RUN], others)
    assert "#SBATCH --array=0-1" in text
    words = [str(RUN), "--next-task", *map(str, others)]
    assert text[-1] == f"exec {sys.executable} -u -m toolkit.launch.inside {' '.join(words)}"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert inside.mine(words) == others
    assert inside.mine(words[2:]) == others


# --- job steps --------------------------------------------------------------------------------------


def test_a_step_word_by_word() -> None:
    where = srun.Placement(("n1", "n2"), 4, component=1)
    assert srun.step("worker-0", where, ClusterConfig(extra_srun=["--network=sn_all"]), ["true"]) == [
        "srun",
        "--job-name=worker-0",
        "--het-group=1",
        "--nodes=2",
        "--nodelist=n1,n2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--overlap",
        "--overcommit",
        "--mem=0",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=0",
        "--export=ALL",
        "--network=sn_all",
        "true",
    ]
    assert not any("het-group" in word for word in srun.step("a", srun.Placement(("n",), 1), ClusterConfig(), []))


def test_ranks_run_in_the_container_and_the_load_generator_does_not() -> None:
    cluster = ClusterConfig(
        launcher="slurm", device="cuda", container_image="/i.sqsh", container_mounts=["/models:/models:ro"]
    )
    inside = ["env", f"PYTHONPATH={srun.ROOT}", "python3", "-m", "toolkit.launch.rank", "/r/s.json"]
    mounts = f"/r:/r,{srun.ROOT}:{srun.ROOT},/models:/models:ro"
    assert srun.process_command(cluster, "rank", Path("/r"), Path("/r/s.json")) == (
        ["--container-image=/i.sqsh", f"--container-mounts={mounts}", "--no-container-mount-home"],
        inside,
    )
    apptainer = dataclasses.replace(cluster, container_runtime="apptainer", container_image="/i.sif")
    assert srun.process_command(apptainer, "frontend", Path("/r"), Path("/r/s.json")) == (
        [],
        ["apptainer", "exec", "--nv", "--bind", mounts, "/i.sif", *inside],
    )
    outside = ([], [sys.executable, "-m", "toolkit.launch.rank", "/r/s.json"])
    assert srun.process_command(cluster, "loadgen", Path("/r"), Path("/r/s.json")) == outside
    assert srun.engine_python(cluster) == "python3"
    assert srun.engine_python(ClusterConfig()) == sys.executable


def test_the_ranks_of_a_worker_are_one_step_and_uneven_ones_two() -> None:
    def spec(index: int, node: int, group: str) -> ProcessSpec:
        return ProcessSpec("rank", index, ("x",), node=node, group=group)

    even = [spec(i, i // 2, "worker-0") for i in range(4)]
    uneven = [spec(4, 0, "worker-1"), spec(5, 1, "worker-1"), spec(6, 1, "worker-1")]
    steps = srun.groups([*even, *uneven, ProcessSpec("frontend", 0, ("x",))])
    assert [(name, [s.index for s in members]) for name, members in steps] == [
        ("worker-0", [0, 1, 2, 3]), ("worker-1", [5, 6]), ("worker-1-of-1", [4]), ("frontend-0", [0]),
    ]  # fmt: skip


def test_the_environment_of_a_role() -> None:
    cfg = experiment(cluster={"env": {"A": "1", "B": "1"}, "role_env": {"rank": {"B": "2"}}})
    specs = [ProcessSpec("rank", 0, ("x",), {"C": "3"}), ProcessSpec("loadgen", 0, ("x",))]
    rank, loadgen = with_environment(specs, cfg, [Node("10.0.0.1", 20_000, "eth0")])
    assert rank.env == {"GLOO_SOCKET_IFNAME": "eth0", "C": "3", "A": "1", "B": "2"}
    assert loadgen.env == {"GLOO_SOCKET_IFNAME": "eth0", "A": "1", "B": "1"}
    named = experiment(cluster={"network_interface": "ib0"})
    (rank,) = with_environment(specs[:1], named, [Node("10.0.0.1", 20_000, "ib0")])
    assert rank.env == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "C": "3"}


# --- nodes and their ports --------------------------------------------------------------------------


def test_pools_lie_one_after_the_other() -> None:
    cfg = on_slurm(pools={FRONTEND: {"partition": "cpu"}})
    assert [(p.name, p.first_node, p.num_nodes) for p in pools(cfg)] == [(FRONTEND, 0, 1), (AGG, 1, 4)]
    deployment = plan(cfg, [20_000, 21_000, 22_000, 23_000, 24_000])
    worker = deployment.workers[0]
    assert (worker.pool, worker.dist_port, deployment.frontend.node) == (AGG, 21_003, 0)
    assert [r.node for r in worker.ranks] == [1 + i // 8 for i in range(32)]
    assert worker.ranks[8].inbox_port == 22_000 + 4 + 8


def test_an_allocation_of_several_components_gives_each_pool_its_own() -> None:
    kinds = pools(on_slurm(pools={FRONTEND: {}}))
    allocation = Allocation("7", (("c1",), ("g1", "g2", "g3", "g4", "g5")))
    assert allocation.take(kinds) == [("c1", 0), ("g1", 1), ("g2", 1), ("g3", 1), ("g4", 1)]
    flat = Allocation("7", (("n1", "n2", "n3", "n4", "n5"),))
    assert flat.take(kinds) == [(f"n{i}", None) for i in range(1, 6)]
    with pytest.raises(RunFailed, match=r"the plan needs 5 nodes, job 7 has 1 \(n1\)"):
        Allocation("7", (("n1",),)).take(kinds)


def test_claimed_ports_are_nobody_elses() -> None:
    first = ports.claim(20)
    others = [ports.claim(20) for _ in range(10)]
    ranges = [set(range(c.first, c.first + 20)) for c in (first, *others)]
    assert len(set().union(*ranges)) == 20 * 11
    with socket.create_server(("127.0.0.1", first.first)):
        pass  # a claim does not take the port itself
    for claim in (first, *others):
        claim.close()


def test_a_node_alone_is_reached_on_loopback_and_an_unknown_interface_is_named() -> None:
    assert node.address(node.Ask(["n1"], ["n1"], 3), "n1") == ("127.0.0.1", "")
    assert node.address(node.Ask(["n1", "n2"], ["127.0.0.1", "127.0.0.1"], 3), "n2") == ("127.0.0.1", "lo")
    with pytest.raises(ValueError, match=r"cluster\.network_interface=ib7 is not there: use one of: .*lo"):
        node.address(node.Ask(["n1", "n2"], ["n1", "n2"], 3, interface="ib7"), "n1")


# --- who shares an allocation -----------------------------------------------------------------------


def kinds(*cfgs: ExpConfig) -> list[list[int]]:
    """Of each job the number of runs of each of its tasks."""
    return [[len(task) for task in job] for job in groups([Experiment(cfg, []) for cfg in cfgs])]


def changed(cfg: ExpConfig, group: str, **keys: Any) -> ExpConfig:
    return dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **keys)})


def test_loads_of_one_deployment_share_an_allocation_and_deployments_are_an_array() -> None:
    base = on_slurm()
    load, engine = changed(base, "load", osl=7), changed(base, "engine", page_size=32)
    larger = on_slurm({**FOUR_BY_EIGHT, "tp_size": 64, "dp_size": 64, "moe_dp_size": 8})
    assert kinds(base, load) == [[2]]
    assert kinds(base, engine) == [[1, 1]]
    assert kinds(base, engine, larger, load, changed(load, "engine", page_size=32)) == [[2, 2], [1]]
    cfgs = base, engine, load
    assert kinds(*(changed(c, "cluster", pack="allocation") for c in cfgs)) == [[3]]
    assert kinds(*(changed(c, "cluster", pack="array") for c in cfgs)) == [[1, 1, 1]]
    packed = groups([Experiment(changed(c, "cluster", pack="allocation"), []) for c in cfgs])
    assert [e.cfg.engine.page_size for e in packed[0][0]] == [16, 16, 32], "those of one deployment side by side"


def test_what_may_be_loaded_on_the_processes_of_the_run_before() -> None:
    base = on_slurm()
    assert may_share(base, changed(base, "load", osl=7, nodes=2))
    assert not may_share(base, changed(base, "engine", page_size=32))
    assert not may_share(base, changed(base, "cluster", env={"NCCL_DEBUG": "WARN"}))
    moving = changed(base, "engine", enable_eplb=True)
    assert not may_share(moving, moving), "experts would begin where the load before has left them"


# --- checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"time_min": 0}, "cluster.time_min=0 must be at least 1"),
        ({"time_min": 2, "signal_s": 120}, "cluster.signal_s=120 leaves nothing of cluster.time_min=2"),
        ({"extra_sbatch": ["comment"]}, "cluster.extra_sbatch: 'comment' is not an option"),
        ({"pools": {"decode": {}}}, "cluster.pools=decode is not known, use one of: agg, frontend"),
        ({"pools": {"frontend": {"partitoin": "x"}}}, "cluster.pools.frontend.partitoin is not a key of cluster"),
        ({"pools": {"frontend": {"port": 1}}}, "cluster.pools.frontend.port: pools can differ in account"),
        ({"pools": {"frontend": {"partition": 3}}}, "cluster.pools.frontend.partition=3: Expected `str`, got `int`"),
        ({"role_env": {"ranks": {}}}, "cluster.role_env=ranks is not known, use one of: frontend, loadgen, rank"),
    ],
)
def test_a_mistake_in_what_is_asked_of_slurm_is_told(cluster: dict[str, Any], message: str) -> None:
    errors = list(check_slurm.check_slurm(on_slurm(**cluster), 0))
    assert any(error.startswith(message) for error in errors), errors


def test_a_sweep_that_cannot_end_in_time_is_refused() -> None:
    cfg = on_slurm(time_min=10)
    long = dataclasses.replace(
        cfg, load=from_mapping({"concurrency": [1, 8], "num_requests": 80, "osl": 1000}, LoadConfig)
    )
    assert list(check_slurm.check_slurm(cfg, 0)) == []
    (error,) = check_slurm.check_slurm(long, 8 * 10**9)
    assert error.startswith(
        "cluster.time_min=10: the sweep takes 13 min at the least (start 32 s, points 11 min, 88 s)"
    )
    assert "use time_min=" in error
    requeued = dataclasses.replace(long, cluster=dataclasses.replace(long.cluster, requeue=True))
    assert estimate.at_least(requeued, 0).total > 480
    assert len(list(check_slurm.check_slurm(requeued, 0))) == 1, "no single start can do its longest point"


@pytest.mark.parametrize(
    ("limit", "minutes"), [("30:00", 30), ("8:00:00", 480), ("1-12:00:00", 2160), ("infinite", None), ("0:30", 0.5)]
)
def test_time_limits_as_sinfo_prints_them(limit: str, minutes: float | None) -> None:
    assert check_slurm.parse_minutes(limit) == minutes


def test_a_job_as_scontrol_prints_it() -> None:
    line = (
        "JobId=3 JobName=my State=x UserId=root(0) JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 "
        "Restarts=2 StartTime=2026-11-22T01:00:00 NodeList=(null) BatchHost=node7 "
    )
    job = queue.parse_job(line)
    assert job == queue.JobState("PENDING", "Resources", "2026-11-22T01:00:00", "", 2, "node7")
    assert job.active and not queue.JobState("NODE_FAIL").active
