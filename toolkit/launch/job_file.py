"""``launch/job.json`` in a run folder: who runs it, a Slurm job or a process of some machine.

Written before the first process starts, so that a run can be found, followed and ended from another terminal
(``jobs.py``). Nothing in it is a name that two runs could share.
"""

from __future__ import annotations

import getpass
import os
import platform
import time
from pathlib import Path

import msgspec
import psutil

from toolkit.launch.launcher import STATE_DIR
from toolkit.records.files import write_json

NAME = "job.json"


class JobRecord(msgspec.Struct, frozen=True):
    """Who runs a folder.

    Attributes:
        host, user: where it was started, or submitted, and by whom.
        began: Unix seconds of that.
        job_id: of Slurm, ``17`` or ``17_3``; empty for a run without Slurm.
        pid, create_time: of the launcher of such a run.
    """

    host: str
    user: str
    began: float
    job_id: str = ""
    pid: int = 0
    create_time: float = 0.0


def by_slurm(job_id: str) -> JobRecord:
    return JobRecord(platform.node(), _user(), time.time(), job_id)


def of_this_process() -> JobRecord:
    """The job that this process is in, or the process itself."""
    if job_id := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return by_slurm(f"{job_id}_{os.environ['SLURM_ARRAY_TASK_ID']}")
    if job_id := os.environ.get("SLURM_JOB_ID"):
        return by_slurm(job_id)
    me = psutil.Process()
    return JobRecord(platform.node(), _user(), time.time(), pid=me.pid, create_time=me.create_time())


def write(run_dir: Path, record: JobRecord) -> None:
    write_json(run_dir / STATE_DIR / NAME, msgspec.to_builtins(record))


def read(run_dir: Path) -> JobRecord | None:
    """None where nobody said."""
    try:
        return msgspec.json.decode((run_dir / STATE_DIR / NAME).read_bytes(), type=JobRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def find(results: Path) -> list[Path]:
    """Every run folder under ``results`` that says who runs it, the newest first."""
    files = results.glob(f"*/*/{STATE_DIR}/{NAME}")
    folders = {file.parents[1] for file in files if not file.parents[1].is_symlink()}
    return sorted(folders, key=lambda folder: folder.name, reverse=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return ""
