"""Jobs that start again: after preemption, a lost node, the time limit the sweep goes on in the same folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run, rank_process
from toolkit.records.requests import read_requests

pytestmark = pytest.mark.slow

TWO = ["parallel=dep2", "cluster.gpus_per_node=1", "cluster.requeue=true", "load.warmup_requests=0", "load.osl=8"]
POINTS = ["load.concurrency=[1,2,3]", "load.num_requests=40"]


def wait_for_point(run: Run, done: int) -> None:
    """Until ``done`` points are done and the next one is under way."""

    def reached() -> bool:
        states = [point.state for point in run.status().points]
        return states.count("done") >= done and "running" in states

    run.eventually(reached, f"{done} points are done and the next one runs")


def ran_once(run: Run) -> None:
    """Every point is there, and its requests are those of one pass over it."""
    status = run.status()
    assert (status.state, [p.state for p in status.points]) == ("done", ["done"] * 3), status
    rows = read_requests(run.folder)
    assert rows.groupby("point").size().tolist() == [40, 40, 40]
    assert set(rows.status) == {"ok"}


def test_a_killed_rank_then_scancel_then_the_rest(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *POINTS)
    wait_for_point(run, 1)
    rank_process(run, 1).kill()
    assert run.end()[0] == 1
    second = Run(tmp_path, *TWO, *POINTS, "resume=true")
    wait_for_point(second, 2)
    cluster.run("scancel", second.job.job_id)
    assert second.end()[0] == 130
    assert second.status().reason == "cancelled by SIGTERM (Slurm: CANCELLED)"
    third = Run(tmp_path, *TWO, *POINTS, "resume=true")
    code, output = third.end()
    assert code == 0, output + third.story()
    assert len(third.folders()) == 1
    ran_once(third)


def test_a_node_that_goes_down_requeues_the_job_and_the_sweep_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *POINTS)
    wait_for_point(run, 1)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    code, output = run.end()
    assert code == 0, output + run.story()
    assert "start 2" in output
    ran_once(run)


def test_a_preempted_job_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO, *POINTS, "cluster.partition=batch", "cluster.nodelist='node[1-2]'")
    wait_for_point(run, 1)
    urgent = ["srun", "--partition=urgent", "--nodelist=node[1-2]", "--nodes=2", "--exclusive", "sleep", "5"]
    done = subprocess.run(urgent, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    code, output = run.end()
    assert code == 0, output + run.story()
    assert "start 2" in output
    ran_once(run)


def test_a_node_that_crashes_is_named_and_the_sweep_goes_on_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    """Everything on node2 dies at once; Slurm itself would notice after SlurmdTimeout only."""
    run = Run(tmp_path, *TWO, *POINTS)
    wait_for_point(run, 1)
    try:
        cluster.crash_node(2)
        said = "no answer from slurmd on node2; "
        run.eventually(lambda: run.status().reason.startswith(said), "the run fails, and says which node is lost")
        code, output = run.end()
    finally:
        cluster.start_node(2)
    assert code == 0, output + run.story()
    assert f"submitted again as job {run.job.job_id} without node2" in output, "Slurm has not missed it yet"
    assert json.loads((run.folder / "launch/excluded.json").read_text()) == {"nodes": ["node2"], "times": 1}
    ran_once(run)


def test_the_time_limit_is_no_end_where_a_job_may_start_again(cluster: Cluster, tmp_path: Path) -> None:
    """Points of a fixed length, three minutes in all, in a job that is told to end after two."""
    rates = [1 + i / 5 for i in range(12)]
    load = [f"load.request_rate={rates}", "load.duration_s=15"]
    run = Run(tmp_path, *TWO, *load, "cluster.time_min=3", "cluster.signal_s=60")
    code, output = run.end(850)
    assert code == 0, output + run.story()
    assert "start 2" in output
    assert [p.state for p in run.status().points] == ["done"] * len(rates)
    assert read_requests(run.folder).groupby("point").size().tolist() == [round(15 * rate) for rate in rates]
