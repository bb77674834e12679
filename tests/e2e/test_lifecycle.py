"""A real run that is disturbed: it ends soon, says why, keeps what was measured, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from toolkit import heartbeat
from toolkit.analysis import Run as Analysis
from toolkit.analysis.levels import run_levels
from toolkit.records.requests import read_requests
from toolkit.records.status import read_status

LAUNCHER = (sys.executable, "-m", "toolkit.launch")


class Run:
    """The launcher as a user starts it: the tiny model on two CPU ranks, under a load it cannot finish soon."""

    def __init__(self, results: Path, more: Sequence[str] = (), launcher: Sequence[str] = LAUNCHER) -> None:
        words = ["+exp=dep16", "cluster=local", "parallel=dep2", f"cluster.results_dir={results}"]
        load = {"load.concurrency": "[2,4]", "load.num_requests": "400", "load.osl": "40", "load.warmup_requests": "0"}
        load |= dict(word.split("=", 1) for word in more)
        command = [*launcher, *words, *(f"{key}={value}" for key, value in load.items())]
        self.folder = results / "dep16" / "latest"
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def wait_for_load(self) -> None:
        """Until the first load point runs."""
        deadline = time.monotonic() + 240
        progress = self.folder / "launch" / "progress.json"
        while not (progress.exists() and json.loads(progress.read_text())["done"] >= 1):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "the load does not start"
            time.sleep(0.2)

    def pid(self, name: str) -> int:
        return int(json.loads((self.folder / "launch" / f"{name}.json").read_text())["pid"])

    def end(self, within_s: float = 240) -> str:
        """Waits for the end; everything the run started must be gone then."""
        output = self.process.communicate(timeout=within_s)[0]
        assert self.left() == []
        return output

    def left(self) -> list[str]:
        """Command lines of processes that still work on the run folder."""
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        return [line for line in lines if str(self.folder.parent) in line]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    try:
        run.wait_for_load()
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()


def test_a_killed_rank_fails_the_run_by_name(run: Run) -> None:
    os.kill(run.pid("rank-1"), signal.SIGKILL)
    output = run.end()
    assert run.process.returncode == 1
    assert "rank-1" in output and "SIGKILL" in output
    assert "rank 1 ready" in output, "the end of its log is shown"
    status = read_status(run.folder)
    assert status.state == "failed" and "rank-1" in status.reason
    assert [p.state for p in status.points] == ["cancelled", "cancelled"]
    assert all("rank-1" in p.reason for p in status.points)
    rows = read_requests(run.folder)
    assert (rows.status == "ok").any(), "what was measured before is kept"


def is_cancelled_and_kept(run: Run, output: str) -> None:
    assert run.process.returncode == 130, output
    status = read_status(run.folder)
    assert status.state == "cancelled"
    assert (read_requests(run.folder).status == "ok").any()
    assert (run.folder / "logs" / "rank-0.log").stat().st_size > 0


def test_a_run_that_is_told_to_end_is_cancelled_and_kept(run: Run) -> None:
    run.process.send_signal(signal.SIGTERM)
    is_cancelled_and_kept(run, run.end())


def test_a_run_is_listed_and_cancelled_from_another_terminal(run: Run) -> None:
    def jobs(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "toolkit.launch.jobs", *words, "--results", str(run.folder.parents[1])]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    listed = jobs().stdout
    assert f"pid {run.process.pid}" in listed and "running" in listed
    assert "rank 2/2" in listed and "frontend 1/1" in listed and "concurrency 2" in listed
    attached = jobs("attach")
    assert attached.returncode == 2 and "use follow" in attached.stderr
    cancelled = jobs("cancel", "dep16")
    assert cancelled.returncode == 0, cancelled.stderr
    assert f"{run.folder.resolve()}: cancelled" in cancelled.stdout, "it waits for the end"
    is_cancelled_and_kept(run, run.end())
    assert jobs("cancel", "dep16").stdout == f"{run.folder.resolve()} is over: cancelled\n"
    assert jobs("follow", str(run.folder)).returncode == 130, "the exit code is the run's"


def test_a_killed_launcher_leaves_nothing(run: Run) -> None:
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 30
    while left := run.left():
        assert time.monotonic() < deadline, f"processes outlive their launcher: {left}"
        time.sleep(0.5)
    status = read_status(run.folder)
    assert status.state == "running", "only the launcher has the last word, and it had none"
    assert heartbeat.run_state(run.folder, status) == "dead", "what readers show"


def test_a_run_whose_launcher_was_killed_is_taken_up_again(tmp_path: Path) -> None:
    """Its first point is done when it is killed: that one is not run again, and the rest is, as one run."""
    short = ["load.concurrency=[1,2]", "load.num_requests=6", "load.osl=4", "load.repeat=2"]
    first = Run(tmp_path, short)
    try:
        first.wait_for_load()
        deadline = time.monotonic() + 120
        while not list((first.folder / "points").glob("*.parquet")):
            assert first.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        first.process.kill()
        first.process.wait()
    done = [point.key for point in read_status(first.folder).points if point.state == "done"]
    kept = {row.request_id for row in Analysis(first.folder).requests.itertuples() if row.point == 0}
    folder = first.folder.resolve()
    _until_dead(folder)
    second = Run(tmp_path, [*short, "resume=true"])
    output = second.process.communicate(timeout=240)[0]
    assert second.process.returncode == 0, output
    assert second.left() == [] and first.folder.resolve() == folder, "the same folder"
    assert f"{len(done)} done" in output and "missing" in output
    run = Analysis(folder)
    assert [(p.concurrency, p.repeat, p.state) for p in run.status.points] == [
        (1, 0, "done"), (2, 0, "done"), (1, 1, "done"), (2, 1, "done"),
    ]  # fmt: skip
    assert run.requests.groupby("point")["request_id"].nunique().tolist() == [6] * 4
    assert {row.request_id for row in run.requests.itertuples() if row.point == 0} == kept, "measured once"
    assert [p.attempt for p in run.status.points][-1] == 2 and run.status.points[0].attempt == 1
    assert run_levels(run)["repeats"].tolist() == [2, 2]
    assert not run.steps.duplicated(["step", "dp_rank"]).any() and len(run.nodes) and not run.warnings
    assert (folder / "attempts" / "1" / "logs" / "rank-0.log").exists()


def _until_dead(folder: Path) -> None:
    """A run that was just killed may still live, for all that another host knows."""
    deadline = time.monotonic() + 60
    while (beat := heartbeat.read(folder)) is not None and beat.alive:
        assert time.monotonic() < deadline
        time.sleep(0.5)
