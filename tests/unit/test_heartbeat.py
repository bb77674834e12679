"""Signs of life: a run is running while they come, and dead when they stop."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from toolkit import heartbeat
from toolkit.heartbeat import Heartbeat, run_state
from toolkit.records.files import write_json
from toolkit.records.status import RunStatus


def test_a_run_is_running_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    with heartbeat.beating(tmp_path):
        deadline = time.monotonic() + 10
        while heartbeat.read(tmp_path) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run_state(tmp_path, RunStatus("running")) == "running"
    assert run_state(tmp_path, RunStatus("running")) == "dead"
    assert run_state(tmp_path, RunStatus("done")) == "done", "an end that was written is believed"


def beat(folder: Path, boot: str, age_s: float) -> str:
    told = Heartbeat("node1", boot, "another container", 1, 0.0, time.time() - age_s)
    write_json(folder / heartbeat.FILE, asdict(told))
    return run_state(folder, RunStatus("running"))


def test_another_hosts_clock_is_trusted_to_a_minute(tmp_path: Path) -> None:
    assert beat(tmp_path, heartbeat._boot(), 5) == "running"
    assert beat(tmp_path, heartbeat._boot(), 60) == "dead"
    assert beat(tmp_path, "another kernel", 60) == "running"
    assert beat(tmp_path, "another kernel", -60) == "running"
    assert beat(tmp_path, "another kernel", 200) == "dead"


def test_half_a_heartbeat_is_none(tmp_path: Path) -> None:
    (tmp_path / heartbeat.FILE).write_text('{"host": "nod')
    assert heartbeat.read(tmp_path) is None


def test_on_the_same_machine_the_process_tells(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        told = dataclasses.replace(Heartbeat.now(), pid=other.pid, started=started, time=time.time() - 3600)
        assert told.alive, "it may be suspended, or its disk may hang"
        assert not dataclasses.replace(told, started=started - 100).alive, "another process with its pid"
        other.kill()
        other.wait()
        assert not dataclasses.replace(told, time=time.time()).alive
