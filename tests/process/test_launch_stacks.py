"""Stacks of processes that hang, as their supervisors dump them; and which rank the others wait for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.test_launch_processes import all_up, eventually, make_folder
from toolkit import records
from toolkit.engine.pulse import Beat, Pulse, path_of, read_beat
from toolkit.launch import stacks, stall
from toolkit.launch.launcher import STATE_DIR, ProcessSpec
from toolkit.launch.local import LocalJob, LocalLauncher
from toolkit.launch.stall import StallWatch, find_behind
from toolkit.launch.watch import RunFailed

HANGS = """
import faulthandler, signal, time
{register}
def waits_for_ever():
    print("up", flush=True)
    time.sleep(600)
waits_for_ever()
"""
LISTENS = HANGS.format(register="faulthandler.register(signal.SIGUSR1, all_threads=True)")
DEAF = HANGS.format(register="")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "run")


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[..., LocalJob]]:
    jobs: list[LocalJob] = []

    def start_job(*codes: str) -> LocalJob:
        specs = [ProcessSpec("rank", i, (sys.executable, "-c", code), grace_s=1.0) for i, code in enumerate(codes)]
        jobs.append(LocalLauncher().start(specs, run_dir, {}))
        eventually(lambda: all_up(jobs[0], run_dir), "all are up")
        return jobs[0]

    yield start_job
    for job in jobs:
        job.stop(1.0)


def log_of(run_dir: Path, rank: int) -> str:
    return (run_dir / records.log_name("rank", rank)).read_text()


def test_every_supervisor_dumps_its_process(start: Callable[..., LocalJob], run_dir: Path) -> None:
    start(LISTENS, DEAF)
    dumped = stacks.ask(run_dir, ["rank-0", "rank-1"])
    assert set(dumped) == {"rank-0", "rank-1"}
    assert all(one.status == "sleeping" for one in dumped.values())
    for rank in (0, 1):
        assert "--- stacks of rank" in log_of(run_dir, rank) and "waits_for_ever" in log_of(run_dir, rank)
    again = stacks.ask(run_dir, ["rank-0"])
    assert set(again) == {"rank-0"} and log_of(run_dir, 0).count("--- stacks of") == 2


def test_a_stopped_process_is_seen_to_be_stopped(start: Callable[..., LocalJob], run_dir: Path) -> None:
    job = start(LISTENS)
    eventually(lambda: job.poll()[0].state == "running", "it is reported")
    os.kill(job.poll()[0].pid, signal.SIGSTOP)
    assert stacks.ask(run_dir, ["rank-0"])["rank-0"].status == "stopped"


def test_without_py_spy_a_process_dumps_itself_and_a_deaf_one_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    monkeypatch.setattr(stacks, "_with_py_spy", lambda *given: "")
    for code, how, text in ((LISTENS, "faulthandler", "waits_for_ever"), (DEAF, "", "no stack: py-spy")):
        log = tmp_path / "log"
        with log.open("wb") as out, subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=out) as process:
            eventually(lambda: b"up" in log.read_bytes(), "it is up")  # noqa: B023
            dumped = stacks.dump(process.pid, "rank-0", log)
            assert dumped.how == how
            eventually(lambda: text in log.read_text(), "the log tells")  # noqa: B023
            assert process.poll() is None
            process.kill()


def beat(rank: int, collectives: int, phase: str = "step", turn: int = 7, requests: int = 1, time: float = 100) -> Beat:
    return Beat(rank, turn, 5, collectives, phase, requests, time)


def test_the_rank_that_has_begun_the_fewest_collectives_is_behind() -> None:
    assert find_behind([beat(0, 12), beat(1, 11), beat(2, 12)]) == beat(1, 11)
    late = beat(2, 11, "schedule", turn=6)
    assert find_behind([beat(0, 12, "agree"), beat(1, 12, "agree"), late]) == late
    assert find_behind([beat(0, 12), beat(1, 12)]) is None
    assert find_behind([beat(0, 12), beat(1, 12, time=50.0)]) == beat(1, 12, time=50.0), "it cannot even write"


def test_a_pulse_tells_where_a_rank_is(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "pulse", 3, lambda: 42)
    pulse.turn, pulse.step, pulse.phase, pulse.requests = 9, 8, "agree", 2
    eventually(lambda: (b := read_beat(tmp_path / "pulse", 3)) is not None and b.phase == "agree", "it is written")
    found = read_beat(tmp_path / "pulse", 3)
    assert found is not None
    assert (found.rank, found.turn, found.step, found.collectives, found.requests) == (3, 9, 8, 42, 2)
    pulse.phase = "idle"
    eventually(lambda: (b := read_beat(tmp_path / "pulse", 3)) is not None and b.phase == "idle", "a shorter one")
    pulse.close()
    assert read_beat(tmp_path / "pulse", 4) is None


def test_idle_ranks_may_rest_and_busy_ones_may_not(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "LOOK_S", 0.0)
    monkeypatch.setattr(stacks, "ask", lambda *given: {"rank-1": stacks.Dumped("rank-1", "stopped", "")})
    folder = run_dir / STATE_DIR / "pulse"
    folder.mkdir()
    specs = [ProcessSpec("rank", rank, ()) for rank in range(2)] + [ProcessSpec("frontend", 0, ())]

    def write(*beats: Beat) -> None:
        import msgspec

        for one in beats:
            path_of(folder, one.rank).write_bytes(msgspec.json.encode(one))

    watch = StallWatch(specs, run_dir, stall_s=0.0)
    write(beat(0, 5, "idle", requests=0), beat(1, 5, "idle", requests=0))
    for _ in range(3):
        watch.check()
    for step in range(3):
        write(beat(0, 6 + step), beat(1, 6 + step))
        watch.check()
    write(beat(0, 9), beat(1, 8))
    watch.check()
    with pytest.raises(RunFailed, match=r"rank-1 is behind, in step of step 5, its process is stopped"):
        watch.check()


def test_the_ranks_of_each_pool_are_watched_by_themselves(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill worker that hangs is not hidden by a decode worker that steps, nor by its own idleness."""
    import msgspec

    monkeypatch.setattr(stall, "LOOK_S", 0.0)
    monkeypatch.setattr(stacks, "ask", lambda *given: {})
    specs = [ProcessSpec(f"{role}0", rank, (), group=f"worker-{i}") for i, role in enumerate(("prefill", "decode"))
             for rank in range(2)]  # fmt: skip
    watch = StallWatch([*specs, ProcessSpec("frontend", 0, ())], run_dir, stall_s=0.0)

    def write(role: str, *beats: Beat) -> None:
        stall.pulse_folder(run_dir, role).mkdir(parents=True, exist_ok=True)
        for one in beats:
            path_of(stall.pulse_folder(run_dir, role), one.rank).write_bytes(msgspec.json.encode(one))

    write("prefill0", beat(0, 5, "idle", requests=0), beat(1, 5, "idle", requests=0))
    for step in range(3):
        write("decode0", beat(0, 6 + step), beat(1, 6 + step))
        watch.check()
    write("prefill0", beat(0, 6), beat(1, 7))
    write("decode0", beat(0, 20), beat(1, 20))
    watch.check()
    write("decode0", beat(0, 21), beat(1, 21))
    with pytest.raises(RunFailed, match=r"requests on the ranks of prefill0: prefill0-0 is behind"):
        watch.check()
