"""Real processes: they are reported, and all of them are gone however the launcher ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from toolkit import records
from toolkit.launch import child
from toolkit.launch.interrupts import Cancelled, Interrupts
from toolkit.launch.launcher import STATE_DIR, ProcessSpec, ProcessState, tail
from toolkit.launch.local import LocalJob, LocalLauncher
from toolkit.launch.watch import RunFailed, Watch, describe

SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)"
STUBBORN = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SLEEP}"
WITH_CHILD = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n{SLEEP}"


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits for what must happen soon; the limit is far away and only ends a test that has failed."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"did not happen: {what}")


def spec(role: str, index: int, code: str) -> ProcessSpec:
    return ProcessSpec(role, index, (sys.executable, "-c", code), grace_s=1.0)


def make_folder(path: Path) -> Path:
    for name in (STATE_DIR, records.LOGS):
        (path / name).mkdir(parents=True)
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "run")


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[..., LocalJob]]:
    jobs: list[LocalJob] = []

    def start_job(*codes: str, **secrets: str) -> LocalJob:
        specs = [spec("rank", i, code) for i, code in enumerate(codes)]
        jobs.append(LocalLauncher().start(specs, run_dir, secrets))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.stop(1.0)


def states(job: LocalJob) -> list[str]:
    return [state.state for state in job.poll()]


def all_up(job: LocalJob, run_dir: Path) -> bool:
    return all("up" in tail(run_dir / s.log) for s in job.specs)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_processes_are_started_reported_and_stopped(start: Callable[..., LocalJob], run_dir: Path) -> None:
    job = start(SLEEP, WITH_CHILD, STUBBORN)
    eventually(lambda: all_up(job, run_dir), "every process prints to its log")
    eventually(lambda: states(job) == ["running"] * 3, "every process is reported as running")
    pids = [p.pid for state in job.poll() for p in (psutil.Process(state.pid), *psutil.Process(state.pid).children())]
    assert len(pids) == 4
    controller = int(job._controller.job_id)
    pids += [controller, *(p.pid for p in psutil.Process(controller).children())]
    job.stop(3.0)
    assert gone(pids)
    assert [(s.state, s.returncode) for s in job.poll()] == [
        ("exited", -signal.SIGTERM),
        ("exited", -signal.SIGTERM),
        ("exited", -signal.SIGKILL),
    ]


def test_a_process_that_ends_by_itself_leaves_its_code_and_the_others_run_on(
    start: Callable[..., LocalJob], run_dir: Path
) -> None:
    job = start("raise SystemExit(7)", SLEEP)
    eventually(lambda: states(job) == ["exited", "running"], "one exited, one running")
    assert job.poll()[0].returncode == 7


def test_a_dead_process_is_named_with_the_end_of_its_log(start: Callable[..., LocalJob], run_dir: Path) -> None:
    job = start(SLEEP, f"print(*range(100), sep='\\n')\n{SLEEP}")
    eventually(lambda: all_up(job, run_dir), "both are up")
    eventually(lambda: states(job) == ["running"] * 2, "both are reported")
    watch = Watch(job, run_dir)
    watch.check()
    os.kill(job.poll()[1].pid, signal.SIGKILL)
    eventually(lambda: not watch.all_alive(), "the death is noticed")
    with pytest.raises(RunFailed, match=r"^rank-1 was killed by SIGKILL$") as failure:
        watch.check()
    assert failure.value.log == run_dir / "logs/rank-1.log"
    assert failure.value.log_tail[-3:] == ["98", "99", "up"]
    assert len(failure.value.log_tail) == 20


def test_a_command_that_is_not_there_is_a_death_that_says_why(run_dir: Path) -> None:
    job = LocalLauncher().start([ProcessSpec("frontend", 0, ("/no/such/command",))], run_dir, {})
    try:
        eventually(lambda: states(job) == ["exited"], "the state is reported")
        with pytest.raises(RunFailed, match="frontend-0 exited with code 127") as failure:
            Watch(job, run_dir).check()
        assert "could not start /no/such/command" in failure.value.log_tail[0]
    finally:
        job.stop(1.0)


def test_killing_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from toolkit.launch.launcher import ProcessSpec
from toolkit.launch.local import LocalLauncher
codes = {[WITH_CHILD, STUBBORN]!r}
specs = [ProcessSpec("rank", i, (sys.executable, "-c", code), grace_s=0.5) for i, code in enumerate(codes)]
job = LocalLauncher().start(specs, Path({str(make_folder(tmp_path / "run"))!r}), {{}})
print(job._controller.job_id, flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    logs = [tmp_path / "run/logs" / f"rank-{i}.log" for i in range(2)]
    try:
        eventually(lambda: all("up" in tail(log) for log in logs), "both processes are up")
        eventually(lambda: tail(logs[0]).count("up") == 2, "the process's own child is up")
        left = [p.pid for p in psutil.Process(launcher.pid).children(recursive=True)]
        assert len(left) == 1 + 2 + 3  # controller, tasks, processes with one child
        launcher.kill()
        launcher.wait()
        eventually(lambda: gone(left), "nothing is left")
    finally:
        launcher.kill()
        launcher.wait()


def test_killing_the_controller_is_noticed_and_leaves_nothing(start: Callable[..., LocalJob], run_dir: Path) -> None:
    job = start(SLEEP, SLEEP)
    eventually(lambda: states(job) == ["running"] * 2, "both are reported")
    pids = [state.pid for state in job.poll()]
    os.kill(int(job._controller.job_id), signal.SIGKILL)
    eventually(lambda: gone(pids), "the processes end with it")
    eventually(lambda: not Watch(job, run_dir).all_alive(), "it is noticed")


def test_secrets_reach_the_processes_and_no_file(start: Callable[..., LocalJob], run_dir: Path) -> None:
    code = f"import os\nprint(os.environ['TOOLKIT_RUN_TOKEN'][::-1], flush=True)\n{SLEEP}"
    job = start(code, TOOLKIT_RUN_TOKEN="f00dcafe12345678")
    assert "TOOLKIT_RUN_TOKEN" not in os.environ
    eventually(lambda: all_up(job, run_dir), "the process is up")
    assert tail(run_dir / "logs/rank-0.log")[0] == "87654321efacd00f"
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    assert any(file.suffix == ".pkl" for file in files)
    assert not any(b"f00dcafe" in file.read_bytes() for file in files)


def test_visible_gpus_are_the_launchers(
    start: Callable[..., LocalJob], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    job = start(f"import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n{SLEEP}")
    eventually(lambda: all_up(job, run_dir), "the process is up")
    assert tail(run_dir / "logs/rank-0.log")[0] == "3,5"


def test_state_files_say_what_happened(start: Callable[..., LocalJob], run_dir: Path) -> None:
    job = start("pass")
    eventually(lambda: states(job) == ["exited"], "it exits")
    state = json.loads((run_dir / STATE_DIR / "rank-0.json").read_text())
    assert state["name"] == "rank-0"
    assert state["returncode"] == 0
    assert state["create_time"] <= state["ended"]


def test_a_killed_process_is_the_cause_and_failed_ones_the_consequence(run_dir: Path) -> None:
    class Fixed:
        specs = tuple(spec("rank", i, "") for i in range(3))

        def poll(self) -> list[ProcessState]:
            return [
                ProcessState("rank-0", "exited", 1, ended=1.0),
                ProcessState("rank-1", "running"),
                ProcessState("rank-2", "exited", -9, ended=2.0),
            ]

        def stop(self, grace_s: float) -> None: ...

    with pytest.raises(RunFailed, match=r"^rank-2 was killed by SIGKILL \(then rank-0\)$"):
        Watch(Fixed(), run_dir).check()


def test_describe() -> None:
    assert describe(ProcessState("rank-1", "exited", 3)) == "rank-1 exited with code 3"
    assert describe(ProcessState("rank-1", "lost")).startswith("rank-1 was lost")


def test_ending_a_child_takes_its_children_along(tmp_path: Path) -> None:
    process = child.start([sys.executable, "-c", WITH_CHILD], tmp_path / "log")
    eventually(lambda: tail(tmp_path / "log").count("up") == 2, "both are up")
    pids = [process.pid, *(p.pid for p in psutil.Process(process.pid).children())]
    assert child.end(process, 5.0) == -signal.SIGTERM
    eventually(lambda: gone(pids), "both are gone")


def test_signals_raise_wait_or_are_dropped() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        with pytest.raises(Cancelled, match="cancelled by SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        passed = []
        with pytest.raises(Cancelled, match="cancelled by SIGINT"), interrupts.held():
            signal.raise_signal(signal.SIGINT)
            passed.append("the block ran to its end")
        assert passed
        with interrupts.ignored():
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
