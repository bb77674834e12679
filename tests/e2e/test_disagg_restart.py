"""A worker that is killed in a run is started anew by the launcher when that is asked for, and the run ends well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from toolkit import records
from toolkit.analysis.imbalance import window_loads
from toolkit.records.experts import read_experts
from toolkit.records.requests import read_requests
from toolkit.records.status import read_status

WORDS = [
    "+exp=disagg_ab", "~variants.agg", "model=tiny", "deploy.decode.workers=2", "deploy.restart_workers=1",
    "deploy.worker_timeout_s=20", "health.preflight=false", "load.dataset=random", "load.isl=40", "load.osl=12",
    "load.concurrency=[4]", "load.num_requests=60", "load.warmup_requests=0",
]  # fmt: skip


def test_a_killed_worker_is_started_anew_and_used_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "toolkit.launch", *WORDS, f"cluster.results_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "disagg_ab-disagg" / "latest"
    try:
        progress = folder / "launch" / "progress.json"
        until(process, lambda: progress.exists() and json.loads(progress.read_text())["done"] >= 1, "the load starts")
        url = f"http://127.0.0.1:{json.loads((folder / records.PLAN).read_text())['frontend']['http_port']}"
        sleep = {"forward_sleep_time": 0.2}  # so that the load lasts until the worker is back, however fast this is
        requests.post(f"{url}/slow_down?pool=decode", json=sleep, timeout=10)

        def decode0() -> dict[str, Any]:
            workers = requests.get(f"{url}/get_server_info", timeout=10).json()["workers"]
            return next(worker for worker in workers if worker["name"] == "decode0")

        pid = int(json.loads((folder / "launch" / "decode0-0.json").read_text())["pid"])
        requests.post(f"{url}/dump_expert_distribution_record?pool=decode", json={}, timeout=30).raise_for_status()
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        until(process, lambda: bool(decode0()["down"]), "its end is noticed")
        until(process, lambda: not decode0()["down"], "it is back")
        until(process, lambda: decode0()["num_open"] > 0, "it is used again")
        requests.post(f"{url}/slow_down?pool=decode", json={"forward_sleep_time": None}, timeout=10)
        output = process.communicate(timeout=240)[0]
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, output
    assert "decode0 has ended: it is started anew (deploy.restart_workers: 0 more)" in output
    rows = read_requests(folder)
    assert len(rows) == 60 and (rows["status"] == "ok").all() and (rows["output_tokens"] == 12).all()
    assert read_status(folder).state == "done"
    experts = read_experts(folder / records.EXPERTS)
    assert experts.times[0, 1] < killed < experts.times[-1, 0], "windows of both of its lives"
    assert len(experts.placement) == 2 and window_loads(experts).loads_WLG.sum(), "which fit together"


def until(process: subprocess.Popen[str], condition: Callable[[], bool], what: str, limit_s: float = 180.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"not yet: {what}"
        time.sleep(0.1)
