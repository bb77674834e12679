"""The sampler of a node, as its own process: rows while it runs, the rest at SIGTERM, never a reason to end a run."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.process.test_launch_processes import eventually
from tests.unit.launch_experiment import experiment
from toolkit import records
from toolkit.analysis import Run
from toolkit.launch import sampler
from toolkit.records.samples import HOST, NodeSample
from toolkit.records.streams import open_rows


def test_it_samples_until_it_is_ended(tmp_path: Path) -> None:
    cfg = experiment(health={"sample_interval_s": 0.05})
    (spec,) = sampler.specs(cfg, 1, tmp_path)
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(spec.argv, stdout=log, stderr=log) as process:
        file = tmp_path / records.NODE_SAMPLES / "node-0.arrows"
        eventually(file.exists, "it begins")
        eventually(lambda: psutil.Process(process.pid).cpu_times().user > 0.3, "it works")
        signal.sigtimedwait([], 1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "ms of CPU each" in (tmp_path / "log").read_text()
    sampler.collect(tmp_path)
    (tmp_path / records.STATUS).write_text('{"state": "done"}')
    nodes = Run(tmp_path).nodes
    host = nodes[nodes["gpu"] == HOST]
    assert len(host) > 3 and (host["time"].diff().dropna() > 0).all()
    assert len(host) <= (host["time"].iloc[-1] - host["time"].iloc[0]) / 0.05 + 2, "no more than asked for"
    assert (host["memory_total_bytes"] == psutil.virtual_memory().total).all()
    assert (host["utilization"].iloc[1:] >= 0).all() and (host["net_rx_bytes"].diff().dropna() >= 0).all()


def test_rows_of_a_killed_run_are_read(tmp_path: Path) -> None:
    (tmp_path / records.NODE_SAMPLES).mkdir()
    with open_rows(tmp_path / records.NODE_SAMPLES / "node-0.arrows", NodeSample) as write:
        write([NodeSample(1.0, "a", HOST, 0.5)])
        (tmp_path / records.STATUS).write_text('{"state": "running"}')
        assert Run(tmp_path).nodes["utilization"].tolist() == [0.5]


def test_no_samples_are_taken_where_none_are_wanted(tmp_path: Path) -> None:
    assert sampler.specs(experiment(health={"sample_interval_s": 0}), 2, tmp_path) == []
    specs = sampler.specs(experiment(), 3, tmp_path)
    assert [(spec.name, spec.node, spec.critical) for spec in specs] == [
        ("sampler-0", 0, False), ("sampler-1", 1, False), ("sampler-2", 2, False),
    ]  # fmt: skip


def test_a_disk_that_refuses_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert sampler.main(["--out", str(tmp_path / "file" / "x.arrows")]) == 0
    assert "no more samples" in caplog.text
