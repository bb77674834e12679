"""A node that is really bad: it does not see the disk that all share. A job of any shape goes on without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait
from tests.slurm.runs import SHORT, Run
from toolkit import records
from toolkit.launch import job_file
from toolkit.launch.preflight import read_bad
from toolkit.records.status import read_status

TWO = ["parallel=dep2", "cluster.gpus_per_node=1", "cluster.exclude_bad_nodes=true", *SHORT]
BAD = 2


@pytest.fixture
def node_without_the_disk(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Node 2 does not see the folder of results."""
    cluster.crash_node(BAD)
    cluster.start_node(BAD, hidden=tmp_path)
    wait(lambda: f"node{BAD}" in cluster.idle_nodes(), "the node is back, without its disk")
    yield
    cluster.crash_node(BAD)
    cluster.start_node(BAD)


def hosts(folder: Path) -> set[str]:
    states = [json.loads(file.read_text()) for file in (folder / "launch").glob("rank-[0-9]*.json")]
    return {state["host"] for state in states}


def is_left_out(folder: Path) -> None:
    """The run is done, on other nodes, and says why it was submitted again."""
    assert read_status(folder).state == "done"
    assert f"node{BAD}" not in hosts(folder)
    assert json.loads((folder / "launch/excluded.json").read_text()) == {"nodes": [f"node{BAD}"], "times": 1}
    (first, second) = json.loads((folder / records.MANIFEST).read_text())["attempts"]
    assert first["reason"].startswith(f"preflight: 1 bad node: node{BAD}: no report: preflight-")
    assert f"node{BAD} cannot read {folder}" in first["reason"]
    assert second["state"] == "done"


@pytest.mark.usefixtures("node_without_the_disk")
def test_a_bad_node_is_named_and_the_job_submitted_without_it(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, *TWO)
    code, output = run.end()
    assert code == 0, output + run.story()
    assert f"submitted again as job {run.job.job_id} without node{BAD}" in output
    assert [p.state for p in run.status().points] == ["done", "done"]
    is_left_out(run.folder)
    assert read_bad(run.folder) == []


@pytest.mark.slow
@pytest.mark.usefixtures("node_without_the_disk")
def test_a_first_node_that_cannot_start_the_job_is_left_out_by_whoever_follows(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Nothing of the toolkit ever ran on it."""
    cluster.run("sbatch", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    run = Run(tmp_path, *TWO)
    code, output = run.end()
    assert code == 0, output + run.story()
    assert f"node{BAD} could not start the batch script" in output
    assert f"submitted again as job {run.job.job_id} without node{BAD}" in output
    assert f"node{BAD}" not in hosts(run.folder) and run.status().state == "done"


@pytest.mark.slow
@pytest.mark.usefixtures("node_without_the_disk")
def test_every_component_of_a_heterogeneous_job_does_without_it(cluster: Cluster, tmp_path: Path) -> None:
    """Frontend on node 1; the ranks' component, which comes after it, gets the next two."""
    run = Run(tmp_path, *TWO, "+cluster.pools.frontend.nodelist=node1", "+cluster.pools.agg.exclude=node9")
    code, output = run.end()
    assert code == 0, output + run.story()
    is_left_out(run.folder)
    again = (run.folder / "launch/run-again-1.sbatch").read_text()
    assert [line for line in again.splitlines() if "exclude=" in line] == [
        f"#SBATCH --exclude=node{BAD}",
        f"#SBATCH --exclude=node9,node{BAD}",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("node_without_the_disk")
def test_a_task_of_an_array_goes_on_as_a_job_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """Two deployments of two loads each: the loads that wait in the same task go along."""
    run = Run(tmp_path, *TWO, "-m", "engine.page_size=16,8", "load.seed=1,2")
    code, output = run.end(600)
    assert code == 0, output + run.story()
    folders = run.folders()
    assert [read_status(folder).state for folder in folders] == ["done"] * 4
    again = [folder for folder in folders if (folder / "launch/run-again-1.sbatch").exists()]
    assert len(again) == 1, "of the task that had the bad node"
    is_left_out(again[0])
    jobs = [note.job_id for folder in folders if (note := job_file.read(folder))]
    assert sorted("_" in job for job in jobs) == [False, False, True, True], "two in the array, two in the new job"
