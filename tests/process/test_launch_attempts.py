"""A run folder that is taken up again: what stays, what moves aside, what is refused, and how it reads as one run."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.process.test_launch_run import LOADING, deploy, execute
from tests.unit.analysis_run import EPOCH, record, skewed_experts
from tests.unit.launch_experiment import experiment
from toolkit import heartbeat, point_files, records
from toolkit.analysis import Run
from toolkit.config.experiment import ExpConfig
from toolkit.launch import attempts, run
from toolkit.launch.attempts import deployment_key
from toolkit.loadgen import resume
from toolkit.loadgen.options import Options
from toolkit.loadgen.points import points_of
from toolkit.records.experts import write_experts
from toolkit.records.requests import requests_table
from toolkit.records.samples import MetricSample, write_server_metrics
from toolkit.records.status import PointState, PointStatus, RunStatus, read_status, write_status
from toolkit.records.steps import StepRecord, open_steps, steps_path


def again(results: Path, **groups: object) -> ExpConfig:
    return experiment(cluster={"results_dir": str(results)}, resume=True, **groups)  # type: ignore[arg-type]


def finish(folder: Path, cfg: ExpConfig, states: Sequence[PointState]) -> None:
    """Files the load points of ``cfg`` as the load generator would, in these states."""
    base = resume.base_settings(Options(deployment=deployment_key(cfg)))
    base["load"] = resume.load_settings(cfg.load)
    for index, (point, state) in enumerate(zip(points_of(cfg.load), states, strict=True)):
        settings = resume.point_settings(base, point)
        status = PointStatus(point.concurrency, state, "because", key=point_files.key_of(settings), ended=EPOCH + index)
        rows = requests_table([record(point=index, concurrency=point.concurrency, t_send=EPOCH + index)])
        point_files.write_point(folder, status, {"concurrency": point.concurrency}, settings, rows)


def test_a_second_attempt_puts_the_first_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch, 503, LOADING, "print('first'); raise SystemExit(3)")
    _, run_dir, _ = execute(tmp_path)
    deploy(monkeypatch, 503, LOADING, "print('second'); raise SystemExit(4)")
    out = io.StringIO()
    assert run.run(again(tmp_path), ["resume=true"], Console(file=out, width=200)) == 1
    assert run_dir.resolve() == (tmp_path / "test/latest").resolve(), "the same folder"
    assert (run_dir / "logs/rank-0.log").read_text() == "second\n"
    assert (run_dir / "attempts/1/logs/rank-0.log").read_text() == "first\n"
    assert json.loads((run_dir / "attempts/1/launch/rank-0.json").read_text())["returncode"] == 3
    entries = json.loads((run_dir / records.MANIFEST).read_text())["attempts"]
    assert [entry["attempt"] for entry in entries] == [1, 2]
    assert [entry["reason"] for entry in entries] == ["rank-0 exited with code 3", "rank-0 exited with code 4"]
    assert (run_dir / "attempts/1/overrides.yaml").read_text() == "- load.osl=1\n"
    assert read_status(run_dir).reason == "rank-0 exited with code 4"


def test_what_changed_between_attempts_is_in_the_manifest(tmp_path: Path) -> None:
    manifest = {"git": {"commit": "aaa", "dirty": False}, "host": {"name": "node1"}, "packages": {"torch": "2.13"}}
    assert attempts.begin(tmp_path, manifest) == 1
    write_status(tmp_path, RunStatus("cancelled", "preempted", [PointStatus(1, "done")]))
    later = {"git": {"commit": "bbb", "dirty": False}, "host": {"name": "node7"}, "packages": {"torch": "2.13"}}
    assert attempts.begin(tmp_path, later) == 2
    found = json.loads((tmp_path / records.MANIFEST).read_text())
    assert found["attempts"][1]["changed"] == {"git.commit": ["aaa", "bbb"], "host.name": ["node1", "node7"]}
    assert found["git"]["commit"] == "bbb"
    assert read_status(tmp_path).points[0].state == "done"


def test_points_are_told_apart_and_nothing_starts_when_all_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(monkeypatch, 503, LOADING, "raise SystemExit(3)")
    _, run_dir, _ = execute(tmp_path)
    cfg = again(tmp_path)
    finish(run_dir, cfg, ["done", "invalid", "failed", "cancelled"])
    left, lines = attempts.left_to_do(experiment(load={"concurrency": [1, 2, 4, 8, 16]}), run_dir)
    assert left == 4 and lines[0] == "1 done, 1 invalid, 1 failed, 1 cancelled, 1 missing"
    assert lines[1:] == ["  concurrency 2: invalid: because", "  concurrency 4: failed: because",
                         "  concurrency 8: cancelled: because", "  concurrency 16: missing"]  # fmt: skip
    finish(run_dir, cfg, ["done"] * 4)
    out = io.StringIO()
    assert run.run(cfg, [], Console(file=out, width=200)) == 0
    assert "Every load point is done: nothing is started" in out.getvalue()
    assert read_status(run_dir).state == "done"


def test_a_folder_of_something_else_or_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch, 503, LOADING, "raise SystemExit(3)")
    _, run_dir, _ = execute(tmp_path)
    with pytest.raises(ValueError, match=r"engine.page_size=16 there, 32 now; load.osl=32 there, 64 now"):
        attempts.find(again(tmp_path, engine={"page_size": 32}, load={"osl": 64}))
    moved = again(tmp_path, load={"concurrency": [64], "repeat": 3, "timeout_s": 5.0}, deploy={"host": "127.0.0.2"})
    assert attempts.find(moved) == run_dir.resolve()
    assert attempts.find(experiment(run_dir=str(run_dir))) == run_dir.resolve(), "the same command, the same folder"
    assert attempts.find(experiment(cluster={"results_dir": str(tmp_path)})) is None, "not asked for"
    assert attempts.find(experiment(exp="other", cluster={"results_dir": str(tmp_path)}, resume=True)) is None
    with heartbeat.beating(run_dir):
        while heartbeat.read(run_dir) is None:
            threading.Event().wait(0.01)
        with pytest.raises(ValueError, match="is in use by process"):
            attempts.find(again(tmp_path))


def test_a_resumed_run_reads_as_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    first = records.attempt_folder(tmp_path, 1)
    for number, folder in enumerate((first, tmp_path)):
        (folder / records.STEPS).mkdir(parents=True)
        begin = EPOCH + 100 * number
        with open_steps(steps_path(folder, 0)) as write:
            write([StepRecord(step, begin + step, 0.01, 0, 1, 1, 0, 1, 0, 0, 100, 0) for step in range(5)])
        experts = skewed_experts(rng, begin, begin + 5, layers=2)
        experts.slot_counts = experts.counts.copy()
        write_experts(folder / records.EXPERTS, experts)
        write_server_metrics(folder, [MetricSample(begin, "u", "n", "{}", 1.0)])
    write_status(tmp_path, RunStatus("done"))
    read = Run(tmp_path)
    assert read.steps["step"].tolist() == list(range(10)), "no two passes share a number"
    assert len(read.server_metrics) == 2
    assert read.experts is not None and read.experts.times[0, 0] < EPOCH + 1 < read.experts.times[-1, 0]
    assert len(read.experts.placement) == 2 and not read.warnings
    assert read.experts.slot_counts is not None
    assert (read.experts.slot_counts == read.experts.counts).all(), "rows of each slot, in windows of both"
