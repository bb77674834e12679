"""From experiments to jobs in Slurm's queue, and their progress in the user's terminal.

A job's run folder is made before it is submitted; ``launch/job.json`` in it says which job it is. Following reads what
the job writes there and asks ``squeue`` as little as possible, so that the terminal may go away and come back
(``python -m toolkit.launch.jobs attach``). Only Ctrl-C ends the job, by its id. Read next: ``inside.py``.
"""

from __future__ import annotations

import getpass
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from toolkit import records
from toolkit.config import ExpConfig, to_mapping
from toolkit.launch import queue, sbatch
from toolkit.launch.launcher import STATE_DIR

JOB = "job.json"  # inside STATE_DIR


@dataclass(frozen=True)
class Experiment:
    """What the user asked for, resolved and checked."""

    cfg: ExpConfig
    overrides: list[str]


class JobRecord(msgspec.Struct, frozen=True):
    """``launch/job.json``: who runs this folder.

    Attributes:
        job_id: of Slurm, ``17`` or ``17_3``; empty for a run without Slurm.
        pid, create_time: of the launcher of such a run, on ``host``.
    """

    host: str
    user: str
    submitted: float
    job_id: str = ""
    pid: int = 0
    create_time: float = 0.0


def script(experiments: Sequence[Experiment]) -> str:
    """The scripts that would be submitted, with ``<time>`` in place of what only the submission decides."""
    texts = []
    for group, array in groups(experiments):
        run_dirs = [Path(e.cfg.cluster.results_dir).absolute() / e.cfg.exp / "<time>" for e in group]
        texts.append(sbatch.script(group[0].cfg, run_dirs, array))
    return "\n".join(texts)


def submit(experiments: Sequence[Experiment], console: Console) -> list[Path]:
    """Submits all and returns their run folders. Raises ``ValueError`` when Slurm refuses one."""
    from toolkit.launch.run import create_folder, say

    run_dirs: list[Path] = []
    for group, array in groups(experiments):
        folders = [create_folder(e.cfg, e.overrides, "queued") for e in group]
        try:
            job_id = _sbatch(group[0].cfg, folders, array)
        except queue.SlurmError as error:
            from toolkit.launch.inside import never_begun

            never_begun(folders, str(error))
            raise ValueError(f"Slurm did not take the job: {error}") from None
        for index, folder in enumerate(folders):
            mine = f"{job_id}_{index}" if array else job_id
            note(folder, JobRecord(platform.node(), getpass.getuser(), time.time(), mine))
            say(console, f"Submitted job {mine}: {folder}")
        run_dirs += folders
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


def note(run_dir: Path, record: JobRecord) -> None:
    records.write_json(run_dir / STATE_DIR / JOB, msgspec.to_builtins(record))


def read_note(run_dir: Path) -> JobRecord | None:
    """Who runs the folder; None where nobody said."""
    try:
        return msgspec.json.decode((run_dir / STATE_DIR / JOB).read_bytes(), type=JobRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _sbatch(cfg: ExpConfig, run_dirs: Sequence[Path], array: bool) -> str:
    """Submits the script of ``run_dirs`` and returns the job's id; the script stays in the first folder."""
    import submitit

    text = sbatch.script(cfg, run_dirs, array)

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        """submitit with a script of ours: it may be of several components, and reads no pickle."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

    logging.getLogger("submitit").setLevel(logging.WARNING)
    if not queue.here():
        raise queue.SlurmError("sbatch is not installed here: run this on a login node, or use emit=sbatch")
    folder = run_dirs[0] / STATE_DIR / "submitit"
    folder.mkdir()
    try:
        job = Executor(folder=folder)._submit_command("")
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise queue.SlurmError(_said(str(error))) from None
    return str(job.job_id)


def _said(error: str) -> str:
    """What sbatch said, without submitit's frame around it."""
    lines = [line.strip() for line in error.splitlines() if "sbatch: error" in line]
    return " ".join(line.partition("sbatch: error: ")[2] for line in lines) or error.strip()


def _deployment(cfg: ExpConfig) -> Any:
    """Everything but the load."""
    return {name: value for name, value in to_mapping(cfg).items() if name not in ("load", "exp", "rehearsal")}


def _hashable(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")
