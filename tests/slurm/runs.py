"""A run on the test cluster as a user starts it: the launcher's command line, the tiny model, CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from toolkit.launch import job_file
from toolkit.launch.job_file import JobRecord
from toolkit.records.status import RunStatus, read_status

ROOT = Path(__file__).parents[2]
TINY = ["+exp=dep16", "cluster=slurm", "cluster.device=cpu"]
SHORT = ["load.concurrency=[1,2]", "load.osl=4", "load.warmup_requests=0"]
LONG = ["load.concurrency=[1,2,4]", "load.num_requests=400", "load.osl=40", "load.warmup_requests=0"]
SOON_S = 300.0  # for what must happen; its end means that it does not


class Run:
    """``python -m toolkit.launch WORDS`` with its results under ``results``."""

    def __init__(self, results: Path, *words: str, env: dict[str, str] | None = None, inside: str = "") -> None:
        self.results = results
        where = ["chroot", inside, "env", f"--chdir={ROOT}", f"PYTHONPATH={ROOT}"] if inside else []
        command = [sys.executable, "-m", "toolkit.launch", *TINY, f"cluster.results_dir={results}", *words]
        self.process = subprocess.Popen(
            [*where, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )

    @property
    def folder(self) -> Path:
        """The only run folder."""
        self.eventually(lambda: bool(self.folders()), "a run folder")
        return self.folders()[0]

    def folders(self) -> list[Path]:
        return sorted(job_file.find(self.results))

    @property
    def job(self) -> JobRecord:
        note = job_file.read(self.folder)
        assert note is not None
        return note

    def status(self) -> RunStatus:
        return read_status(self.folder)

    def progress(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "launch" / "progress.json").read_text()))
        except FileNotFoundError:
            return {}

    def wait_for_load(self) -> None:
        """Until requests are answered."""
        self.eventually(lambda: self.progress().get("done", 0) >= 1, "the load begins")

    def eventually(self, condition: Any, what: str, within_s: float = SOON_S) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if not self.folders() and self.process.poll() is not None:
                raise AssertionError(f"was not submitted: {self.process.communicate()[0]}")
            assert time.monotonic() < deadline, f"does not happen: {what}; {self.story()}"
            time.sleep(0.1)

    def end(self, within_s: float = 400) -> tuple[int, str]:
        """(exit code, what the user saw). Nothing of the run is left on any node."""
        try:
            output = self.process.communicate(timeout=within_s)[0]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end: {self.story()}") from None
        self.eventually(lambda: not self.left(), f"everything is gone: {self.left()}", 20)
        return self.process.returncode, output

    def left(self) -> list[str]:
        """Command lines of processes that still work on the run; all nodes of the test cluster are this machine."""
        lines = [(p.pid, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"])]
        mine = {self.process.pid, os.getpid()}
        return [line for pid, line in lines if str(self.results) in line and pid not in mine]

    def story(self) -> str:
        """What there is to read when a test fails."""
        logs = [p for folder in self.folders() for p in sorted((folder / "logs").glob("[ls]*.log"))]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in logs)


def rank_process(run: Run, rank: int) -> psutil.Process:
    """The engine process of a rank; all nodes of the test cluster are this machine."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "toolkit.engine.worker" in words and str(run.results) in " ".join(words) and words[-1] == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank}")
