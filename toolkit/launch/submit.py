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
from typing import Any

import msgspec
from rich.console import Console

from toolkit.config import ExpConfig, to_mapping
from toolkit.launch import attempts, job_file, queue, sbatch
from toolkit.launch.launcher import STATE_DIR

SCRIPT = "run.sbatch"  # inside STATE_DIR of a job's first run folder


@dataclass(frozen=True)
class Experiment:
    """What the user asked for, resolved and checked."""

    cfg: ExpConfig
    overrides: list[str]


@dataclass(frozen=True)
class Prepared:
    """A job on disk: its run folders, and its script in the first of them."""

    run_dirs: list[Path]
    array: bool
    script: Path


def prepare(experiments: Sequence[Experiment]) -> list[Prepared]:
    """Makes the run folders and the scripts of all jobs; submits nothing."""
    from toolkit.launch.run import create_folder

    prepared = []
    for experiment in experiments:
        _refuse_twice(experiment.cfg)
    for group, array in groups(experiments):
        run_dirs = [create_folder(e.cfg, e.overrides, "queued") for e in group]
        file = run_dirs[0] / STATE_DIR / SCRIPT
        file.write_text(sbatch.script(group[0].cfg, run_dirs, array))
        file.chmod(0o755)
        prepared.append(Prepared(run_dirs, array, file))
    return prepared


def submit(experiments: Sequence[Experiment], console: Console) -> list[Path]:
    """Submits all and returns their run folders. Raises ``ValueError`` when Slurm refuses one."""
    from toolkit.launch.inside import never_begun
    from toolkit.launch.run import say

    run_dirs: list[Path] = []
    for job in prepare(experiments):
        try:
            job_id = _sbatch(job.script)
        except queue.SlurmError as error:
            never_begun(job.run_dirs, f"Slurm did not take the job: {error}")
            raise ValueError(f"Slurm did not take the job: {error} (its script: {job.script})") from None
        for index, folder in enumerate(job.run_dirs):
            mine = f"{job_id}_{index}" if job.array else job_id
            job_file.write(folder, job_file.by_slurm(mine))
            say(console, f"Submitted job {mine}: {folder}")
        run_dirs += job.run_dirs
    return run_dirs


def groups(experiments: Sequence[Experiment]) -> list[tuple[list[Experiment], bool]]:
    """(experiments of one job, whether it is an array) for each job.

    Experiments whose deployment is the same share an allocation, others are tasks of an array, as far as they ask the
    same of Slurm; ``cluster.pack`` can insist on either.
    """
    alike: dict[Any, list[Experiment]] = {}
    for experiment in experiments:
        alike.setdefault(_hashable(sbatch.allocation_key(experiment.cfg)), []).append(experiment)
    jobs = []
    for members in alike.values():
        pack = members[0].cfg.cluster.pack
        same = len({_hashable(_deployment(e.cfg)) for e in members}) == 1
        array = len(members) > 1 and (pack == "array" or (pack == "auto" and not same))
        jobs.append((members, array))
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


def _deployment(cfg: ExpConfig) -> Any:
    """Everything but the load."""
    return {name: value for name, value in to_mapping(cfg).items() if name not in ("load", "exp", "rehearsal")}


def _hashable(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")
