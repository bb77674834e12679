"""The whole line on a GPU: launcher, a rank with graphs and steps launched ahead, HTTP, load, report."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.needs import needs_gpus

# Qwen3-30B-A3B's shape, four layers of it, random weights
COMMAND = [
    "+exp=smoke", "model=qwen3_30b_a3b", "model.hf_config.num_hidden_layers=4", "cluster=local", "cluster.device=cuda",
    "engine.page_size=64", "engine.mem_fraction_static=0.5", "engine.max_running_requests=16",
    "engine.chunked_prefill_size=2048", "load.dataset=random", "load.isl=256", "load.osl=64",
    "load.concurrency=[2,16]",
]  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "dispatcher"),
    [
        pytest.param("dep1", "allgather", marks=needs_gpus(1)),
        pytest.param("dep2", "deepep", marks=needs_gpus(2)),
        pytest.param("dep4", "nvlink", marks=needs_gpus(4)),
    ],
)
def test_requests_are_served(tmp_path: Path, parallel: str, dispatcher: str) -> None:
    options = [f"parallel={parallel}", f"engine.moe_a2a_backend={dispatcher}", f"cluster.results_dir={tmp_path}"]
    command = [sys.executable, "-m", "toolkit.launch", *COMMAND, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = (f for f in (tmp_path / "smoke").iterdir() if not f.is_symlink())
    points = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [p["concurrency"] for p in points] == ["2", "16"] and all(p["failed"] == "0" for p in points)
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    logs = "".join(f.read_text() for f in (folder / "logs").glob("*.log"))
    assert "captured decode graphs" in logs and "GPU memory" in logs
