"""Follows submitted runs in a terminal: the queue, then what each run's launcher prints, until its job is over.

Everything shown is read from the run folder and asked of Slurm by job id; closing the terminal changes nothing for the
job. Ctrl-C cancels: first in order (the launcher ends its processes and writes down what it has), the second time at
once. A job that Slurm ended without a word of ours gets one here, in status.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from toolkit.launch import exclude, job_file, queue
from toolkit.launch.attempts import read_config
from toolkit.launch.inside import LOG
from toolkit.launch.queue import JobState
from toolkit.launch.run import EXIT_CODES
from toolkit.launch.show import say
from toolkit.records.status import read_status, write_status

ASK_S = 2.0  # between two questions to Slurm, which a whole site shares
LOOK_S = 0.25
SETTLE_S = 10.0
ORDERLY = "TERM"
LAUNCH_FAILED = "JobLaunchFailure"


def follow(run_dirs: Sequence[Path], console: Console) -> int:
    """Shows each run to its end; returns the worst exit code."""
    worst = 0
    try:
        for run_dir in run_dirs:
            worst = max(worst, Follower(run_dir, console).run())
    except KeyboardInterrupt:
        return cancel(run_dirs, console)
    return worst


def cancel(run_dirs: Sequence[Path], console: Console) -> int:
    """Ends the jobs of ``run_dirs``, by id, and waits for it."""
    jobs = dict.fromkeys(note.job_id for d in run_dirs if (note := job_file.read(d)) and note.job_id)
    try:
        for job_id in jobs:
            state = queue.job(job_id)
            if not state.active:
                continue
            if state.state == "RUNNING":
                say(console, f"Ending job {job_id} in order; Ctrl-C again ends it at once")
                queue.signal_batch(job_id, ORDERLY)
            else:
                queue.cancel(job_id)
        for run_dir in run_dirs:
            Follower(run_dir, console).run()
    except KeyboardInterrupt:
        for job_id in jobs:
            queue.cancel(job_id)
        for run_dir in run_dirs:
            Follower(run_dir, console).run()
    return EXIT_CODES["cancelled"]


class Follower:
    """One run folder and its job."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        note = job_file.read(run_dir)
        assert note and note.job_id, f"{run_dir} is not of a Slurm job"
        self._run_dir, self._console, self._job_id = run_dir, console, note.job_id
        self._shown = self._size() if self._pending() else 0  # bytes of the log; what an earlier job left is not news
        self._said = ""

    def run(self) -> int:
        """Returns when the job is over, with the run's exit code."""
        asked = -ASK_S
        while True:
            if time.monotonic() - asked >= ASK_S:
                job, asked = self._ask(), time.monotonic()
                if job is not None and not job.active:
                    self._show_log()
                    self._leave_out_first_node(job)
                    note = job_file.read(self._run_dir)
                    if note and note.job_id not in ("", self._job_id):  # submitted again, without a bad node
                        self._job_id, asked = note.job_id, -ASK_S
                        continue
                    return settle(self._run_dir, job)
            self._show_log()
            time.sleep(LOOK_S)

    def _leave_out_first_node(self, job: JobState) -> None:
        """A node that cannot even start the batch script leaves it to us to submit the run again without it."""
        if job.reason != LAUNCH_FAILED or not job.first_node or not self._pending():
            return
        cfg = read_config(self._run_dir)
        if cfg.cluster.exclude_bad_nodes:
            self._say(f"{job.first_node} could not start the batch script: is {self._run_dir} there?")
            exclude.submit_again(cfg, self._run_dir, [], [job.first_node])

    def _pending(self) -> bool:
        return read_status(self._run_dir).state == "queued"

    def _size(self) -> int:
        log = self._run_dir / LOG
        return log.stat().st_size if log.exists() else 0

    def _ask(self) -> JobState | None:
        """How the job stands; None while Slurm's controller does not answer, which ends nothing."""
        try:
            job = queue.job(self._job_id)
        except queue.SlurmError as error:
            self._say(str(error))
            return None
        self._say(f"Job {self._job_id}: {self._state(job)}")
        return job

    def _state(self, job: JobState) -> str:
        text = job.state or "unknown to Slurm"
        if job.state == "PENDING":
            text += f" ({job.reason})" if job.reason else ""
            text += f", expected to start {job.start}" if job.start else ""
        elif job.nodes:
            text += f" on {job.nodes}" + (f", start {job.restarts + 1}" if job.restarts else "")
        return text

    def _say(self, text: str) -> None:
        """Unless it was the last thing said."""
        if text != self._said:
            say(self._console, text)
            self._said = text

    def _show_log(self) -> None:
        """What came to the launcher's log since the last look, whole lines."""
        try:
            with (self._run_dir / LOG).open("rb") as file:
                file.seek(self._shown)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        if end:
            sys.stderr.write(data[:end].decode(errors="replace"))
            sys.stderr.flush()
            self._shown += end


def settle(run_dir: Path, job: JobState) -> int:
    """The exit code of a run; one that Slurm ended before it could say so gets Slurm's word in its status.json."""
    status, deadline = read_status(run_dir), time.monotonic() + SETTLE_S
    while status.state in ("queued", "running") and not job.active and time.monotonic() < deadline:
        time.sleep(LOOK_S)  # its last word may be on its way through a network file system
        status = read_status(run_dir)
    if status.state in ("queued", "running") and not job.active:
        reason = f"Slurm ended the job: {job.state or 'it is not known any more'}" + (
            f" ({job.reason})" if job.reason else ""
        )
        status.state = "cancelled" if job.state in ("CANCELLED", "PREEMPTED", "TIMEOUT") else "failed"
        status.reason = reason
        for point in status.points:
            if point.state in ("pending", "running"):
                point.state, point.reason = "cancelled", reason
        write_status(run_dir, status)
    return EXIT_CODES.get(status.state, 0)
