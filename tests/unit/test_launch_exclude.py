"""A job that met a bad node is submitted again without it, the right number of times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from tests.unit.launch_experiment import experiment
from toolkit.config.mapping import to_mapping
from toolkit.launch import exclude, inside, job_file, preflight, watch
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.preflight import BadNode
from toolkit.records.files import write_json
from toolkit.records.status import PointStatus, RunStatus, read_status, write_status


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose preflight found node3 bad, and an sbatch that writes down how it is called."""
    folder = tmp_path / "run"
    (folder / STATE_DIR / preflight.FOLDER).mkdir(parents=True)
    found(folder, "node3")
    points = [PointStatus(1, "done"), PointStatus(2, "cancelled", "preflight")]
    write_status(folder, RunStatus("failed", "preflight: 1 bad node", points))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" "$SLURM_JOB_ID$SLURM_CONF" >> {tmp_path}/called\necho "43;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    return folder


def found(folder: Path, *hosts: str) -> None:
    bad = [BadNode(i, host, ["port 1 is in use"]) for i, host in enumerate(hosts)]
    write_json(folder / STATE_DIR / preflight.FOLDER / preflight.BAD, msgspec.to_builtins(bad))


def again(run_dir: Path, **cluster: Any) -> bool:
    """Whether it starts again, as its job finds when it has ended."""
    values = to_mapping(experiment())
    values["cluster"] |= {"exclude_bad_nodes": True, "launcher": "slurm", **cluster}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    return inside.Again([], done_before=1)(run_dir)


def calls(run_dir: Path) -> list[str]:
    file = run_dir.parent / "called"
    return file.read_text().splitlines() if file.exists() else []


def left_out(run_dir: Path, number: int) -> list[str]:
    script = (run_dir / STATE_DIR / f"run-again-{number}.sbatch").read_text()
    return [line for line in script.splitlines() if "--exclude=" in line]


def test_the_bad_node_is_left_out_beside_those_of_the_user(run_dir: Path) -> None:
    assert again(run_dir, exclude="node9", pools={"frontend": {"exclude": "cpu1"}})
    assert calls(run_dir) == [f"--parsable {run_dir}/launch/run-again-1.sbatch /etc/x"], "and nothing of job 42"
    assert left_out(run_dir, 1) == ["#SBATCH --exclude=cpu1,node3", "#SBATCH --exclude=node9,node3"]
    status, note = read_status(run_dir), job_file.read(run_dir)
    assert (status.state, [p.state for p in status.points]) == ("queued", ["done", "pending"])
    assert note is not None and note.job_id == "43"


def test_nodes_found_before_stay_out_and_it_ends_some_time(run_dir: Path) -> None:
    assert again(run_dir)
    found(run_dir, "node5")
    assert again(run_dir)
    assert left_out(run_dir, 2) == ["#SBATCH --exclude=node3,node5"]
    assert again(run_dir)
    assert not again(run_dir), "a fault of all nodes is none of any node"
    assert len(calls(run_dir)) == exclude.MOST


def test_it_is_done_only_where_it_is_wanted_and_a_node_is_bad(run_dir: Path) -> None:
    assert not again(run_dir, exclude_bad_nodes=False)
    preflight.forget(run_dir)
    assert not again(run_dir)
    assert calls(run_dir) == [] and read_status(run_dir).state == "failed"


def test_a_refusal_leaves_the_run_as_it_was(run_dir: Path) -> None:
    (run_dir.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: too few nodes' >&2; exit 1\n")
    assert not again(run_dir)
    assert read_status(run_dir).state == "failed"


def test_a_lost_node_is_left_out_where_the_job_may_start_again(run_dir: Path) -> None:
    preflight.forget(run_dir)
    status = RunStatus("failed", watch.lost(["node2", "node7"], "rank-1 was lost"), [PointStatus(1, "done")])
    write_status(run_dir, status)
    assert not again(run_dir, requeue=False)
    assert again(run_dir, requeue=True)
    assert left_out(run_dir, 1) == ["#SBATCH --exclude=node2,node7"]


def test_a_job_that_slurm_starts_again_leaves_a_run_to_the_job_that_has_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file.write(run_dir, job_file.by_slurm("43"))
    assert not inside.taken_over(run_dir), "submitted by hand"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert inside.taken_over(run_dir)
    job_file.write(run_dir, job_file.by_slurm("42"))
    assert not inside.taken_over(run_dir)
