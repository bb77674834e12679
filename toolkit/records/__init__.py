"""What is written to disk: the names in a run folder, and how one is made.

Owns, with the modules of this package, the contract described in results/README.md: one module for each kind of file,
with its schema, its writer and its reader. Derived latencies are not computed here (analysis/metrics.py).
Nothing in a run folder is ever unpickled or evaluated. Heavy libraries are imported where they are used.
Read next: ``files.py`` (how a file is written), ``tables.py`` and ``streams.py`` (records as Arrow), then the kinds:
``status.py``, ``requests.py``, ``sweep.py``, ``steps.py``, ``samples.py``, ``experts.py``.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SCHEMA_VERSION = 2

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
PLAN = "plan.json"
MANIFEST = "manifest.json"
STATUS = "status.json"
REQUESTS = "requests.parquet"
SWEEP = "sweep.csv"
SERVER_METRICS = "server_metrics.parquet"
RAW = "raw.parquet"
EXPERTS = "experts.npz"
PROFILES = "profiles"
REPORT = "report.html"
LOGS = "logs"
CHARTS = "charts"
STEPS = "steps"
WORKERS = "workers"  # a folder for each worker but the main one, with the same files
TRANSFERS = "transfers"
NODES = "nodes.parquet"
NODE_SAMPLES = "nodes"
ATTEMPTS = "attempts"
REBALANCES = "rebalances.jsonl"
EXPERT_DUMPS = "expert_dumps"


def log_name(role: str, index: int) -> str:
    """Path of a process's log inside a run folder."""
    return f"{LOGS}/{role}-{index}.log"


def attempt_folder(folder: Path, number: int) -> Path:
    """Where the files of an attempt that is over lie, once the run has been taken up again."""
    return folder / ATTEMPTS / str(number)


def attempt_folders(folder: Path) -> list[Path]:
    """The folders of all attempts at a run, the first one first; the last is the run folder itself."""
    earlier = [path for path in (folder / ATTEMPTS).glob("*") if path.name.isdigit()]
    return [*sorted(earlier, key=lambda path: int(path.name)), folder]


def new_run_folder(results_dir: Path, exp: str, named: Path | None = None) -> Path:
    """Makes ``<results_dir>/<exp>/<YYYYmmdd-HHMMSS>/`` with logs/ and charts/, and points ``latest`` at it.

    Where the caller has ``named`` a folder, that one is made, and nothing points at it.
    """
    if named is not None:
        for name in (LOGS, CHARTS):
            (named / name).mkdir(parents=True, exist_ok=True)
        return named
    parent = results_dir / exp
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(1, 100))):
        folder = parent / f"{stamp}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    else:
        raise FileExistsError(f"{parent}/{stamp} and 99 more exist already")
    (folder / LOGS).mkdir()
    (folder / CHARTS).mkdir()
    link = parent / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(parent / "latest")
    return folder
