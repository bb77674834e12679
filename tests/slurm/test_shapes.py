"""The shapes a job can have: many nodes, components, arrays, several runs in one, scripts submitted by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait
from tests.slurm.runs import ROOT, SHORT, Run
from tests.unit.launch_experiment import experiment
from toolkit import records
from toolkit.launch import check, job_file
from toolkit.launch.plan import FRONTEND_PORTS, WORKER_PORTS
from toolkit.launch.run import create_folder
from toolkit.records.requests import read_requests
from toolkit.records.status import read_status
from toolkit.records.steps import read_steps

TWO = ["parallel=dep2", "cluster.gpus_per_node=1", "load.concurrency=[1]", "load.osl=4", "load.warmup_requests=0"]


@pytest.mark.slow
def test_a_rack_of_18_nodes_is_planned_and_launched(cluster: Cluster, tmp_path: Path) -> None:
    dims = {"tp_size": 72, "dp_size": 72, "ep_size": 8, "moe_dp_size": 9, "enable_dp_attention": True}
    keys = {"launcher": "slurm", "gpus_per_node": 4, "results_dir": str(tmp_path)}
    run_dir = create_folder(experiment(parallel=dims, cluster=keys), [], "queued")
    out = tmp_path / "job.log"
    command = f"exec {sys.executable} -m tests.slurm.trivial {run_dir}"
    shape = ["--nodes=18", "--gpus-per-node=4", "--exclusive"]
    words = ["--wait", f"--output={out}", f"--chdir={ROOT}", "--wrap", command]
    cluster.run("sbatch", *shape, *words, timeout_s=200)
    result = json.loads((run_dir / "where.json").read_text())
    assert result["where"] == {
        **{f"rank-{r}": f"node{1 + r // 4}" for r in range(72)},
        "frontend-0": "node1",
    }
    assert {int(rank): node for rank, node in result["planned"].items()} == {r: r // 4 for r in range(72)}
    assert len(result["ports"]) == 72 + FRONTEND_PORTS + WORKER_PORTS
    assert len(set(result["ports"])) == len(result["ports"]), "none is shared, though all nodes are one machine"
    assert set(result["ends"].values()) == {-15}
    seen = {(run_dir / f"logs/rank-{rank}.log").read_text() for rank in range(72)}
    assert seen == {"0,1,2,3\n"}, "every rank sees all of the job's GPUs on its node, and takes its own by local rank"


@pytest.mark.slow
def test_frontend_and_ranks_in_two_components_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, "+cluster.pools.frontend.exclusive=false", "+cluster.pools.frontend.mem=1000")
    code, output = run.end()
    assert code == 0, output + run.story()
    plan = json.loads((run.folder / "plan.json").read_text())
    assert [pool["name"] for pool in plan["pools"]] == ["frontend", "agg"]
    hosts = {p.stem: json.loads(p.read_text())["host"] for p in (run.folder / "launch").glob("*-[0-9].json")}
    assert len({hosts["frontend-0"], hosts["rank-0"], hosts["rank-1"]}) == 3
    assert hosts["loadgen-0"] == hosts["frontend-0"]
    assert "#SBATCH hetjob" in (run.folder / "launch/run.sbatch").read_text()
    assert "--het-group=1" not in (run.folder / "launch/run.sbatch").read_text()


@pytest.mark.slow
def test_deployments_that_differ_are_an_array(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, "-m", "engine.page_size=16,8")
    code, output = run.end()
    assert code == 0, output + run.story()
    jobs = [job_file.read(folder) for folder in run.folders()]
    assert sorted(job.job_id.partition("_")[2] for job in jobs if job) == ["0", "1"]
    assert [read_status(folder).state for folder in run.folders()] == ["done", "done"]


def test_loads_of_one_deployment_share_a_job_and_its_processes(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, "-m", "load.seed=1,2")
    code, output = run.end()
    assert code == 0, output + run.story()
    folders = run.folders()
    jobs = {job.job_id for folder in folders if (job := job_file.read(folder))}
    assert len(folders) == 2 and len(jobs) == 1
    served = [json.loads((f / records.MANIFEST).read_text())["attempts"][0]["deployment"] for f in folders]
    assert sorted(one["loads_before"] for one in served) == [0, 1]
    assert {"rank-0", "rank-1", "frontend-0"} <= served[0]["processes"].keys()
    assert served[0]["processes"] == served[1]["processes"], "started once: the same pids"
    for folder in folders:
        assert read_status(folder).state == "done"
        links = [path for path in folder.rglob("*") if path.is_symlink() and path.parent.name != "submitit"]
        assert (folder / "report.html").exists() and not links
    in_order = [folder for _, folder in sorted(zip([one["loads_before"] for one in served], folders))]
    for earlier, later in pairwise(in_order):
        assert read_steps(earlier).t_begin.max() < read_requests(later).t_send.min()
        assert read_steps(later).t_begin.min() > read_requests(earlier).t_send.max()


@pytest.mark.slow
def test_the_script_for_plain_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "job.log"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(Path(sys.executable).parents[1]), "PYTHONPATH": str(ROOT)}
    words = ["exp=dep16", "cluster=slurm", "cluster.device=cpu", f"cluster.results_dir={tmp_path}", *TWO]
    command = ["sbatch", "--wait", "--nodes=2", f"--output={out}", "sbatch/run.sbatch", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, out.read_text()
    (folder,) = job_file.find(tmp_path)
    assert read_status(folder).state == "done"
    assert (folder / "report.html").exists()
    job = job_file.read(folder)
    assert job is not None and f"Submitted batch job {job.job_id}" in done.stdout


@pytest.mark.slow
def test_an_emitted_script_is_the_one_that_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    emitted = Run(tmp_path / "a", *TWO, "emit=sbatch")
    output = emitted.process.communicate(timeout=60)[0]
    script = next((tmp_path / "a").glob("dep16/2*/launch/run.sbatch"))
    assert script.read_text() in output and f"sbatch {script}" in output
    assert not cluster.run("squeue", "-h").strip(), "nothing is submitted"
    cluster.run("sbatch", "--wait", str(script), timeout_s=200)
    assert read_status(script.parents[1]).state == "done"
    submitted = Run(tmp_path / "b", *TWO, "cluster.follow=false")
    assert submitted.process.wait(60) == 0
    theirs = (submitted.folder / "launch/run.sbatch").read_text()
    assert theirs.replace(str(submitted.folder), "RUN") == script.read_text().replace(str(script.parents[1]), "RUN")
    (kept,) = (submitted.folder / "launch/submitit").glob("*_submission.sh")
    assert kept.read_text() == theirs
    cluster.run("scancel", submitted.job.job_id)


def test_jobs_lists_follows_and_cancels(cluster: Cluster, tmp_path: Path) -> None:
    def jobs(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "toolkit.launch.jobs", *words, "--results", str(tmp_path)]
        env = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)

    run = Run(tmp_path, *TWO, "load.num_requests=2000", "cluster.follow=false")
    assert run.process.wait(60) == 0, "it submits and returns"
    run.wait_for_load()
    listed = jobs().stdout
    assert run.job.job_id in listed and "running" in listed and "node[1-2]" in listed
    assert "frontend 1/1" in listed and "rank 2/2" in listed and "loadgen 1/1" in listed
    assert "concurrency 1" in listed
    assert jobs("cancel").returncode == 2, "it ends nothing by guess"
    assert jobs("cancel", "99999").returncode == 2
    cancelled = jobs("cancel", run.job.job_id)
    assert cancelled.returncode == 0, cancelled.stderr
    assert run.status().state == "cancelled"
    assert jobs("follow", run.job.job_id).returncode == 130, "the exit code is the run's"
    assert f"dep16/{run.folder.name}" in jobs().stdout
    wait(lambda: not run.left(), "nothing is left")


def test_what_slurm_would_refuse_is_told_before(cluster: Cluster) -> None:
    def errors(**keys: object) -> list[str]:
        return check.check(experiment(cluster={"launcher": "slurm", "gpus_per_node": 4, **keys}))

    assert errors() == []
    (error,) = errors(partition="btach")
    assert error == "cluster.partition=btach is not known, use one of: batch, urgent; did you mean batch?"
    (error,) = errors(partition="urgent", time_min=31)
    assert error.startswith("cluster.time_min=31: partition urgent allows 30 minutes")
    dims = {"tp_size": 80, "dp_size": 80, "ep_size": 8, "moe_dp_size": 10}
    dims |= {"enable_dp_attention": True, "enable_dp_lm_head": True}
    keys = {"launcher": "slurm", "gpus_per_node": 4}
    (error,) = check.check(experiment(cluster=keys, parallel=dims))
    assert error.startswith("the plan needs 20 nodes for agg, partition batch has 18")


def test_a_refused_submission_says_why_and_leaves_a_word(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, "cluster.constraint=nosuchfeature", *SHORT)
    output = run.process.communicate(timeout=60)[0]
    assert run.process.returncode == 2
    assert "Slurm did not take the job" in output and "Invalid feature specification" in output
    (folder,) = (p.parent for p in tmp_path.glob("dep16/2*/status.json"))
    assert read_status(folder).state == "cancelled"
