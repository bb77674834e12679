"""However a job ends: the folder says what happened, what was measured is kept, nothing is left on any node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import LONG, ROOT, SHORT, Run, rank_process
from toolkit.records.requests import read_requests

TWO = ["parallel=dep2", "cluster.gpus_per_node=1"]


def kept(run: Run) -> bool:
    return bool((read_requests(run.folder).status == "ok").any())


def test_a_killed_rank_ends_the_run_with_its_name(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *LONG)
    run.wait_for_load()
    rank_process(run, 1).kill()
    code, output = run.end()
    assert code == 1
    status = run.status()
    assert (status.state, status.reason.split(" (")[0]) == ("failed", "rank-1 was killed by SIGKILL")
    assert "rank-1 was killed by SIGKILL" in output and "The last lines of" in output
    assert kept(run)


def test_ctrl_c_in_the_terminal_cancels_the_job_in_order(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *LONG)
    run.wait_for_load()
    run.process.send_signal(signal.SIGINT)
    code, output = run.end()
    assert code == 130
    assert f"Ending job {run.job.job_id} in order" in output
    assert run.status().state == "cancelled"
    assert kept(run)
    assert (run.folder / "report.html").exists()


def test_scancel_keeps_what_was_measured(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *LONG)
    run.wait_for_load()
    cluster.run("scancel", run.job.job_id)
    code, output = run.end()
    assert code == 130, output
    status = run.status()
    assert (status.state, status.reason) == ("cancelled", "cancelled by SIGTERM (Slurm: CANCELLED)")
    assert kept(run)


def test_a_closed_terminal_does_not_end_the_job_and_another_attaches_to_it(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *SHORT)
    run.wait_for_load()
    run.process.send_signal(signal.SIGHUP)
    run.process.wait(30)
    command = [sys.executable, "-m", "toolkit.launch.jobs", "attach", run.job.job_id, "--results", str(tmp_path)]
    attached = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert attached.returncode == 0, attached.stderr
    assert f"Job {run.job.job_id}: RUNNING on node" in attached.stdout + attached.stderr
    assert f"Run folder: {run.folder}" in attached.stderr, "from the launcher's first line"
    assert f"Report:     {run.folder}/report.html" in attached.stderr, "to its last"
    assert run.status().state == "done"
    assert [p.state for p in run.status().points] == ["done", "done"]


@pytest.mark.slow
def test_the_time_limit_ends_a_run_before_slurm_does(cluster: Cluster, tmp_path: Path) -> None:
    load = ["load.concurrency=[1]", "load.num_requests=130", "load.osl=40", "load.warmup_requests=0"]
    run = Run(tmp_path, *TWO, *load, "cluster.time_min=2", "cluster.signal_s=60")
    run.wait_for_load()
    code, _ = run.end()
    assert code == 130
    status = run.status()
    assert (status.state, "time limit is near" in status.reason) == ("cancelled", True)
    assert kept(run)


def test_two_jobs_share_nodes_without_sharing_ports(cluster: Cluster, tmp_path: Path) -> None:
    words = [*TWO, *SHORT, "cluster.exclusive=false", "cluster.mem=1000", "cluster.nodelist='node[1-2]'"]
    runs = [Run(tmp_path / str(i), *words) for i in range(2)]
    runs[0].eventually(lambda: all(r.progress() for r in runs), "both are under load at the same time")
    for run in runs:
        code, output = run.end()
        assert code == 0, output
        assert set(read_requests(run.folder).status) == {"ok"}


@pytest.mark.slow
def test_a_slurmd_that_dies_ends_the_job_and_leaves_no_orphan(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *LONG, "cluster.nodelist='node[1-2]'")
    run.wait_for_load()
    try:
        os.kill(cluster.daemon("node2").pid, signal.SIGKILL)
        code, output = run.end()
    finally:
        cluster.start_node(2)
    assert code == 130, output
    assert run.status().reason == "cancelled by SIGTERM (Slurm: NODE FAILURE)"
    assert kept(run)
