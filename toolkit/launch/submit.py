"""From experiments to jobs in Slurm's queue, and their progress in the user's terminal.

A job's run folder is made before it is submitted; ``launch/job.json`` in it says which job it is. Following reads what
the job writes there and asks ``squeue`` as little as possible, so that the terminal may go away and come back
(``python -m toolkit.launch.jobs attach``). Only Ctrl-C ends the job, by its id. Read next: ``inside.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from toolkit.config.experiment import ExpConfig
from toolkit.launch import attempts, job_file, queue, sbatch
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.show import say
from toolkit.launch.standing import arranged

SCRIPT = "run.sbatch"  # inside STATE_DIR of a job's first run folder


@dataclass(frozen=True)
class Experiment:
    """What the user asked for, resolved and checked."""

    cfg: ExpConfig
    overrides: list[str]


@dataclass(frozen=True)
class Prepared:
    """A job on disk: the run folders of each of its tasks (more than one: an array), its script in the first folder."""

    tasks: list[list[Path]]
    script: Path

    @property
    def run_dirs(self) -> list[Path]:
        return [folder for task in self.tasks for folder in task]


def prepare(experiments: Sequence[Experiment]) -> list[Prepared]:
    """Makes the run folders and the scripts of all jobs; submits nothing."""
    from toolkit.launch.run import create_folder

    prepared = []
    for experiment in experiments:
        _refuse_twice(experiment.cfg)
    for job in groups(experiments):
        tasks = [[create_folder(e.cfg, e.overrides, "queued") for e in task] for task in job]
        file = tasks[0][0] / STATE_DIR / SCRIPT
        file.write_text(sbatch.script(job[0][0].cfg, tasks))
        file.chmod(0o755)
        prepared.append(Prepared(tasks, file))
    return prepared


def submit(experiments: Sequence[Experiment], console: Console) -> list[Path]:
    """Submits all and returns their run folders. Raises ``ValueError`` when Slurm refuses one."""
    from toolkit.launch.inside import never_begun

    run_dirs: list[Path] = []
    for job in prepare(experiments):
        try:
            job_id = _sbatch(job.script)
        except queue.SlurmError as error:
            never_begun(job.run_dirs, f"Slurm did not take the job: {error}")
            raise ValueError(f"Slurm did not take the job: {error} (its script: {job.script})") from None
        for index, task in enumerate(job.tasks):
            mine = f"{job_id}_{index}" if len(job.tasks) > 1 else job_id
            for folder in task:
                job_file.write(folder, job_file.by_slurm(mine))
                say(console, f"Submitted job {mine}: {folder}")
        run_dirs += job.run_dirs
    return run_dirs


def groups(experiments: Sequence[Experiment]) -> list[list[list[Experiment]]]:
    """Jobs, each of tasks (more than one: an array), each of the experiments that it runs one after the other.

    A job is of experiments that ask the same of Slurm; those whose deployment is the same are one task of it, as far as
    ``cluster.pack`` does not insist on one task for all, or for each.
    """
    alike: dict[bytes, list[Experiment]] = {}
    for experiment in experiments:
        key = msgspec.json.encode(sbatch.allocation_key(experiment.cfg), order="deterministic")
        alike.setdefault(key, []).append(experiment)
    jobs = []
    for members in alike.values():
        tasks = arranged(members, lambda e: e.cfg)
        match members[0].cfg.cluster.pack:
            case "allocation":
                tasks = [[experiment for task in tasks for experiment in task]]
            case "array":
                tasks = [[experiment] for experiment in members]
        jobs.append(tasks)
    return jobs


def _refuse_twice(cfg: ExpConfig) -> None:
    """A folder to go on with (``resume``, ``run_dir``) must not be a job's that waits or runs."""
    folder = attempts.find(cfg)
    by = job_file.read(folder) if folder else None
    if by and by.job_id and queue.here() and (state := queue.job(by.job_id)).active:
        raise ValueError(
            f"run_dir={folder} is job {by.job_id}'s, which is {state.state}: wait for its end, or end it: "
            f"python -m toolkit.launch.jobs cancel {by.job_id}"
        )


def _sbatch(script: Path) -> str:
    """Submits ``script`` and returns the job's id."""
    import submitit

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        """submitit with a script of ours: it may be of several components, and reads no pickle."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return script.read_text()

    logging.getLogger("submitit").setLevel(logging.WARNING)
    if not queue.here():
        raise queue.SlurmError("sbatch is not installed here: run this on a login node, or use emit=sbatch")
    folder = script.parent / "submitit"
    folder.mkdir(exist_ok=True)
    try:
        return str(Executor(folder=folder)._submit_command("").job_id)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise queue.SlurmError(_said(str(error))) from None


def _said(error: str) -> str:
    """What sbatch said, without submitit's frame around it."""
    lines = [line.strip() for line in error.splitlines() if "sbatch: error" in line]
    return " ".join(line.partition("sbatch: error: ")[2] for line in lines) or error.strip()
