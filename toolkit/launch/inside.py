"""What a submitted job does on its first node: run the experiments of its run folders, one after the other.

``python -m toolkit.launch.inside RUN_DIR...`` reads each folder's config.yaml. The same command in the same folder,
after a requeue, goes on where the sweep was. Submitted by ``submit.py``; the run itself is ``run.py``'s, what starts
again, and where, ``exclude.py``'s.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from toolkit import records
from toolkit.launch import exclude, job_file, preflight, queue
from toolkit.launch.attempts import read_config
from toolkit.launch.interrupts import NOTICE
from toolkit.launch.run import EXIT_CODES, run
from toolkit.launch.sbatch import NEXT_TASK
from toolkit.launch.standing import Standing
from toolkit.launch.watch import lost_nodes
from toolkit.records.status import RunStatus, read_status, write_status

LOG = records.log_name("launcher", 0)
FRUITLESS = 3  # starts without a point done that are put down to preemption
CANCELLED = EXIT_CODES["cancelled"]


def main() -> int:
    """Returns the worst of the runs' exit codes."""
    run_dirs = [folder for folder in mine(sys.argv[1:]) if read_status(folder).state != "done"]
    run_dirs = [folder for folder in run_dirs if not taken_over(folder)]
    worst = 0
    with Standing() as standing:
        for index, run_dir in enumerate(run_dirs):
            rest = run_dirs[index + 1 :]
            job_file.write(run_dir, job_file.of_this_process())  # somebody may have submitted the script by hand
            preflight.forget(run_dir)
            standing.expect(read_config(rest[0]) if rest else None)
            again = Again(rest, points_done(run_dir))
            code = run_one(run_dir, standing, again)
            worst = max(worst, code)
            if again.starts:
                break
            if code == CANCELLED:  # the job is being ended, not this run alone
                never_begun(rest, "an earlier run of the same job was cancelled")
                break
    return worst


def taken_over(run_dir: Path) -> bool:
    """Whether a new job has the run (``exclude.py``), and Slurm has started this one again by itself."""
    by = job_file.read(run_dir)
    return (
        bool(int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        and by is not None
        and (by.job_id != job_file.of_this_process().job_id)
    )


def mine(words: Sequence[str]) -> list[Path]:
    """The run folders of this task, of those of all tasks of an array."""
    tasks: list[list[Path]] = [[]]
    for word in words:
        if word == NEXT_TASK:
            tasks.append([])
        else:
            tasks[-1].append(Path(word))
    return tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])] if len(tasks) > 1 else tasks[0]


def run_one(run_dir: Path, standing: Standing, again: Again) -> int:
    """The exit code of the run in ``run_dir``."""
    from rich.console import Console

    from toolkit.launch.__main__ import set_up_logging

    with output_to(run_dir / LOG):
        set_up_logging()
        overrides = yaml.safe_load((run_dir / records.OVERRIDES).read_text())
        try:
            return run(read_config(run_dir), overrides, Console(stderr=True, width=160), run_dir, standing, again)
        except Exception as error:  # its own faults are in status.json; this is one of ours or the disk's
            sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
            raise


class Again:
    """Called when a run has ended: sees to it that another job, or this one once more, goes on with it and the rest.

    Attributes:
        starts: whether one does.
    """

    def __init__(self, rest: Sequence[Path], done_before: int) -> None:
        self._rest, self._done_before = rest, done_before
        self.starts = False

    def __call__(self, run_dir: Path) -> bool:
        cfg, status = read_config(run_dir), read_status(run_dir)
        bad = [node.host for node in preflight.read_bad(run_dir)] if cfg.cluster.exclude_bad_nodes else []
        goes_on = cfg.cluster.requeue and self._goes_on(run_dir, status)
        if names := bad or (lost_nodes(status.reason) if goes_on else []):
            self.starts = exclude.submit_again(cfg, run_dir, self._rest, names) != ""
        if not self.starts and goes_on:
            queue.requeue(os.environ["SLURM_JOB_ID"])
            self.starts = True
        return self.starts

    def _goes_on(self, run_dir: Path, status: RunStatus) -> bool:
        """After Slurm's notice, or a lost node that it has not missed yet. What Slurm ends itself, it requeues itself.

        Only as long as starts bring points.
        """
        cause = status.reason.startswith(NOTICE) or (status.state == "failed" and bool(lost_nodes(status.reason)))
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cause and (points_done(run_dir) > self._done_before or restarts < FRUITLESS)


def points_done(run_dir: Path) -> int:
    return sum(point.state == "done" for point in read_status(run_dir).points)


def never_begun(run_dirs: Sequence[Path], reason: str) -> None:
    """Says so in the folders of runs that this job will not come to."""
    for run_dir in run_dirs:
        status = read_status(run_dir)
        if status.state == "queued":
            status.state, status.reason = "cancelled", reason
            for point in status.points:
                point.state, point.reason = "cancelled", reason
            write_status(run_dir, status)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Standard output and standard error, those of child processes included, go to ``log`` meanwhile."""
    before = os.dup(1), os.dup(2)
    with log.open("ab") as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), before):
            os.dup2(old, number)
            os.close(old)


if __name__ == "__main__":
    sys.exit(main())
