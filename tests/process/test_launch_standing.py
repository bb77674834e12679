"""Runs that differ in their load alone: one deployment, as long as it is well; each run's folder whole."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.process.leftovers import none_left
from tests.process.test_launch_run import SLEEP, deploy
from tests.unit.launch_experiment import experiment
from toolkit import records
from toolkit.config.experiment import ExpConfig
from toolkit.launch.__main__ import run_here
from toolkit.launch.launcher import ProcessSpec
from toolkit.launch.share import FOLDER, Share
from toolkit.launch.submit import Experiment
from toolkit.records.experts import ExpertCounts, read_experts, write_experts
from toolkit.records.samples import NodeSample
from toolkit.records.status import read_status
from toolkit.records.steps import StepRecord, open_steps, read_steps, steps_path
from toolkit.records.streams import open_rows, read_rows

ANSWER = {"state": "ready", "ranks": [], "data": [{"id": "another-model"}]}


def load(results: Path, osl: int, **groups: Any) -> ExpConfig:
    return experiment(cluster={"results_dir": str(results)}, load={"osl": osl}, **groups)


def run(cfgs: Sequence[ExpConfig]) -> tuple[int, str, list[Path]]:
    """(exit code, what the user saw, run folders)"""
    out = io.StringIO()
    with none_left():
        code = run_here([Experiment(cfg, []) for cfg in cfgs], Console(file=out, width=200))
    results = Path(cfgs[0].cluster.results_dir)
    return code, out.getvalue(), sorted(p for p in (results / "test").iterdir() if not p.is_symlink())


def served(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / records.MANIFEST).read_text())["attempts"][-1]["deployment"]
    return entry


def test_loads_share_processes_and_other_deployments_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load fails (the model is another), and the deployment is well: that is no reason to start it again."""
    deploy(monkeypatch, 200, ANSWER, f"print('up', flush=True)\n{SLEEP}")
    other = load(tmp_path, 1, engine={"page_size": 32})
    code, seen, folders = run([load(tmp_path, 1), other, load(tmp_path, 2)])
    assert code == 1 and len(folders) == 3
    first, second, third = folders
    assert served(first)["processes"] == served(second)["processes"], (
        "the same pids; runs of a deployment come together"
    )
    assert [served(folder)["loads_before"] for folder in folders] == [0, 1, 0]
    assert served(third)["processes"] != served(first)["processes"]
    assert "The deployment is up: load 2 on the same processes" in seen
    for folder in folders:
        assert not [path for path in folder.rglob("*") if path.is_symlink()], "each folder is whole by itself"
        assert "another-model" in read_status(folder).reason
        assert json.loads((folder / "launch/rank-0.json").read_text())["name"] == "rank-0"
    assert (first / "logs/rank-0.log").read_text() == "up\n" == (third / "logs/rank-0.log").read_text()
    assert (
        second / "logs/rank-0.log"
    ).read_text() == f"[its start and earlier loads: {first}/{FOLDER}/logs/rank-0.log]\n"
    assert (second / "nodes.parquet").exists() and (second / "nodes.json").exists()
    assert not (third / FOLDER).exists(), "a run of its own has everything in its folder"


def test_each_load_asks_for_a_dump_of_its_own_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch, 200, ANSWER, SLEEP)
    counting = {"expert_distribution_recorder_mode": "stat"}
    begin = time.time()
    _, _, (first, _) = run([load(tmp_path, osl, engine=counting) for osl in (1, 2)])
    log = (first / FOLDER / "logs/frontend-0.log").read_text()
    dumps = re.findall(r"^POST /dump_expert_distribution_record (.*)$", log, re.MULTILINE)
    one, two = (json.loads(body)["since"] for body in dumps)
    assert one == 0.0 and begin < two < time.time()


def test_a_deployment_that_is_not_well_is_started_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch, 200, ANSWER, SLEEP, flush=500)
    code, seen, folders = run([load(tmp_path, 1), load(tmp_path, 2)])
    assert code == 1
    assert "not well after the load before: starting afresh" in seen
    assert [served(folder)["loads_before"] for folder in folders] == [0, 0]
    assert served(folders[0])["processes"] != served(folders[1])["processes"]


def test_a_rank_that_dies_ends_its_run_and_the_next_one_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(monkeypatch, 503, {"state": "loading"}, "print('no such tensor'); raise SystemExit(3)")
    code, _, folders = run([load(tmp_path, 1), load(tmp_path, 2)])
    assert code == 1
    assert [read_status(f).reason for f in folders] == ["rank-0 exited with code 3"] * 2
    assert [(f / "logs/rank-0.log").read_text() for f in folders] == ["no such tensor\n"] * 2


# --- what is whose ----------------------------------------------------------------------------------


def add_steps(home: Path, begins: Sequence[float]) -> None:
    path = steps_path(home, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_steps(path) as write:
        write([StepRecord(i, t, 0.01, 0, 4, 4, 0, 4, 0, 16, 64, 0) for i, t in enumerate(begins)])


def add_samples(home: Path, times: Sequence[float]) -> None:
    (home / records.NODE_SAMPLES).mkdir(exist_ok=True)
    with open_rows(home / records.NODE_SAMPLES / "node-0.arrows", NodeSample) as write:
        write([NodeSample(time, "n", -1) for time in times])


def counts(ends: Sequence[float], pairs: int) -> ExpertCounts:
    windows = len(ends)
    return ExpertCounts(
        counts=np.arange(windows * 2, dtype=np.int64).reshape(windows, 1, 2),
        times=np.array([[end - 1, end] for end in ends]),
        placement=np.array([[[0, 1]]], np.int32), placement_times=np.array([0.0]), layer_ids=np.array([0], np.int32),
        ep_size=1, pairs=np.full((1, 2, 2), pairs), slot_counts=np.zeros((windows, 1, 2), np.int64),
    )  # fmt: skip


def test_each_run_gets_the_rows_of_its_own_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, runs = tmp_path / "a" / FOLDER, [tmp_path / "a", tmp_path / "b"]
    for folder in (home, *runs):
        (folder / "launch").mkdir(parents=True)
        (folder / "logs").mkdir()
    clock = iter([100.0, 200.0])
    monkeypatch.setattr("toolkit.launch.share.time.time", lambda: next(clock))
    specs, share = [ProcessSpec("rank", 0, ("x",))], Share(home)
    share.lend(runs[0], specs, ["launch/worker-args.json"])
    (home / "logs/rank-0.log").write_text("start\n")
    (home / "launch/worker-args.json").write_text("{}")
    prefill = home / records.WORKERS / "prefill0"
    add_steps(home, [50.0, 60.0])
    add_steps(prefill, [40.0])
    add_samples(home, [50.0])
    write_experts(home / records.EXPERTS, counts([50.0], 7))
    assert len(read_steps(runs[0])) == 2, "also while it runs"
    for at, folder in enumerate((home, prefill)):
        for name in (records.EXPERT_DUMPS, records.PROFILES):
            (folder / name).mkdir()
            (folder / name / f"{at}.pt").write_text("first")
    share.settle(runs[0], specs, ["launch/worker-args.json"])
    (home / records.EXPERT_DUMPS / "later.pt").write_text("second")
    share.lend(runs[1], specs, ["launch/worker-args.json"])
    with (home / "logs/rank-0.log").open("a") as log:
        log.write("second\n")
    add_steps(home, [50.0, 60.0, 150.0])
    add_steps(prefill, [40.0, 140.0])
    add_samples(home, [50.0, 150.0])
    write_experts(home / records.EXPERTS, counts([50.0, 150.0, 160.0], 10))
    share.settle(runs[1], specs, ["launch/worker-args.json"])
    share.over()
    assert [read_steps(folder)["t_begin"].tolist() for folder in runs] == [[50.0, 60.0], [150.0]]
    theirs = [read_steps(folder / records.WORKERS / "prefill0")["t_begin"].tolist() for folder in runs]
    assert theirs == [[40.0], [140.0]], "of every worker"
    samples = [read_rows(folder / records.NODE_SAMPLES, NodeSample)["time"].tolist() for folder in runs]
    assert samples == [[50.0], [150.0]]
    first, second = (read_experts(folder / records.EXPERTS) for folder in runs)
    assert (first.times[:, 1].tolist(), second.times[:, 1].tolist()) == ([50.0], [150.0, 160.0])
    assert second.counts.tolist() == [[[2, 3]], [[4, 5]]] and second.slot_counts is not None
    assert first.pairs is not None and second.pairs is not None
    assert (first.pairs.max(), second.pairs.max()) == (7, 3)
    assert (runs[1] / "logs/rank-0.log").read_text().endswith("]\nsecond\n")
    assert not (home / records.STEPS).exists(), "rows are kept once"
    asked = [[str(path.relative_to(run)) for path in sorted(run.rglob("*.pt"))] for run in runs]
    first_asked = ["expert_dumps/0.pt", "profiles/0.pt", "workers/prefill0/expert_dumps/1.pt"]
    assert asked == [[*first_asked, "workers/prefill0/profiles/1.pt"], ["expert_dumps/later.pt"]]


def test_a_worker_that_was_started_anew_between_two_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts its steps from zero, into a new file, its experts on; each run has what is its own of both lives."""
    home, runs = tmp_path / "a" / FOLDER, [tmp_path / "a", tmp_path / "b"]
    for folder in (home, *runs):
        folder.mkdir(parents=True, exist_ok=True)
    clock = iter([100.0, 200.0])
    monkeypatch.setattr("toolkit.launch.share.time.time", lambda: next(clock))
    share, decode = Share(home), home / records.WORKERS / "decode0"
    share.lend(runs[0], [], [])
    add_steps(decode, [50.0])
    write_experts(decode / records.EXPERTS, counts([50.0], 7))
    share.settle(runs[0], [], [])
    share.lend(runs[1], [], [])
    add_steps(decode, [150.0, 160.0])
    write_experts(decode / records.EXPERTS, counts([50.0, 150.0], 10))
    share.settle(runs[1], [], [])
    mine = [folder / records.WORKERS / "decode0" for folder in runs]
    assert [read_steps(folder)["t_begin"].tolist() for folder in mine] == [[50.0], [150.0, 160.0]]
    pairs = [read_experts(folder / records.EXPERTS).pairs for folder in mine]
    assert [found.max() for found in pairs if found is not None] == [7, 3]
    assert len(list((decode / records.STEPS).iterdir())) == 2


def test_what_cannot_be_cut_out_stays_a_link_and_is_kept(tmp_path: Path) -> None:
    home, run_dir = tmp_path / "a" / FOLDER, tmp_path / "a"
    home.mkdir(parents=True)
    share = Share(home)
    share.lend(run_dir, [], [])
    add_steps(home, [50.0])
    (home / records.EXPERTS).write_bytes(b"half a file")
    share.settle(run_dir, [], [])
    share.over()
    assert read_steps(run_dir)["t_begin"].tolist() == [50.0]
    assert (run_dir / records.EXPERTS).is_symlink() and (run_dir / records.EXPERTS).read_bytes() == b"half a file"
    assert (home / records.STEPS).exists()
