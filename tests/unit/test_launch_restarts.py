"""Which workers are started anew, and when: a job whose launcher is asked for more jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.launch import restarts
from toolkit.launch.launcher import ProcessSpec, ProcessState
from toolkit.launch.restarts import RestartingJob

SPECS = (
    *(
        ProcessSpec(f"{name}0", rank, (), group=f"worker-{i}")
        for i, name in enumerate(("prefill", "decode"))
        for rank in range(2)
    ),
    ProcessSpec("frontend", 0, ()),
)


class Started:
    """A job whose processes run until a test says otherwise."""

    def __init__(self, specs: Sequence[ProcessSpec]) -> None:
        self.specs = tuple(specs)
        self.states = {spec.name: ProcessState(spec.name, "running") for spec in specs}
        self.stopped = False

    def poll(self) -> list[ProcessState]:
        return list(self.states.values())

    def stop(self, grace_s: float) -> None:
        self.stopped = True

    def end(self, *names: str) -> None:
        for name in names:
            self.states[name] = replace(self.states[name], state="exited", returncode=-9)


class Starter:
    """A launcher, as far as it is asked to start more."""

    def __init__(self) -> None:
        self.jobs: list[Started] = []
        self.secrets: list[Mapping[str, str]] = []

    def start(self, specs: Sequence[ProcessSpec], run_dir: Path, secrets: Mapping[str, str]) -> Started:
        self.jobs.append(Started(specs))
        self.secrets.append(secrets)
        return self.jobs[-1]


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Started, Starter, RestartingJob]:
    (tmp_path / "launch").mkdir()
    first, starter = Started(SPECS), Starter()
    job = RestartingJob(first, starter, tmp_path, {"TOKEN": "t"}, limit=1)  # type: ignore[arg-type]
    job.arm()
    return first, starter, job


def dead(job: RestartingJob) -> list[str]:
    return [state.name for state in job.poll() if not state.alive]


def test_a_worker_is_started_anew_when_all_its_ranks_have_ended(parts: tuple[Started, Starter, RestartingJob]) -> None:
    first, starter, job = parts
    assert dead(job) == [] and not starter.jobs
    first.end("decode0-1")
    assert dead(job) == [] and not starter.jobs, "its peers are given time to notice"
    first.end("decode0-0")
    assert dead(job) == []
    assert [spec.name for spec in starter.jobs[0].specs] == ["decode0-0", "decode0-1"]
    assert starter.secrets == [{"TOKEN": "t"}], "the new ranks speak with the same frontend"
    assert dead(job) == [] and len(starter.jobs) == 1
    starter.jobs[0].end("decode0-0", "decode0-1")
    assert dead(job) == ["decode0-0", "decode0-1"], "once is the limit"
    job.stop(1.0)
    assert first.stopped and starter.jobs[0].stopped


def test_each_worker_has_its_own_count_and_others_are_not_started_anew(
    parts: tuple[Started, Starter, RestartingJob],
) -> None:
    first, starter, job = parts
    first.end("prefill0-0", "prefill0-1", "decode0-0", "decode0-1")
    assert dead(job) == [] and len(starter.jobs) == 2
    first.end("frontend-0")
    assert dead(job) == ["frontend-0"]


def test_ranks_that_outlive_their_peer_for_too_long_end_the_worker(
    parts: tuple[Started, Starter, RestartingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, starter, job = parts
    first.end("decode0-1")
    assert dead(job) == []
    monkeypatch.setattr(restarts, "LEAVE_S", -1.0)
    assert dead(job) == ["decode0-1"] and not starter.jobs


def test_nothing_is_started_anew_before_all_were_ready_or_without_being_asked(tmp_path: Path) -> None:
    for limit, arm in ((1, False), (0, True)):
        first, starter = Started(SPECS), Starter()
        job = RestartingJob(first, starter, tmp_path, {}, limit)  # type: ignore[arg-type]
        if arm:
            job.arm()
        first.end("decode0-0", "decode0-1")
        assert dead(job) == ["decode0-0", "decode0-1"] and not starter.jobs
