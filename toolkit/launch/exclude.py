"""A run goes on in a new job, without nodes that its preflight found bad or that it has lost.

Called inside the job when the run has ended. The new job is for what is left, and is the same but for ``--exclude`` in
every component; so a task of an array, or a heterogeneous job, is like any other. (The job itself, requeued, would wait
until Slurm has given the lost node up.) Owns ``launch/excluded.json``. Which node is bad, and why, is
``preflight.py``'s.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit.config.experiment import ExpConfig
from toolkit.launch import attempts, job_file, queue, sbatch
from toolkit.launch.launcher import STATE_DIR
from toolkit.records.files import write_json

log = logging.getLogger(__name__)

FILE = "excluded.json"  # inside STATE_DIR
MOST = 3  # times that a run is submitted again: a fault of all nodes is none of any node


class Excluded(msgspec.Struct, frozen=True):
    nodes: list[str] = []
    times: int = 0


def submit_again(cfg: ExpConfig, run_dir: Path, others: Sequence[Path], names: Sequence[str]) -> str:
    """The id of a new job without ``names`` for ``run_dir`` and then ``others``, which wait in this one.

    Empty, with the reason in the log, where Slurm does not take it, or where that has happened too often.
    """
    before = _read(run_dir)
    names = [*dict.fromkeys([*before.nodes, *names])]
    if before.times >= MOST:
        log.error("submitted %d times without bad nodes (%s): not again", MOST, ", ".join(names))
        return ""
    script = run_dir / STATE_DIR / f"run-again-{before.times + 1}.sbatch"
    try:
        script.write_text(sbatch.script(cfg, [[run_dir, *others]], names))
        job_id = queue.submit(script)
    except (OSError, queue.SlurmError) as error:
        log.error("not submitted again without %s: %s", ", ".join(names), error)
        return ""
    log.warning("submitted again as job %s without %s", job_id, ", ".join(names))
    for folder in (run_dir, *others):
        write_json(folder / STATE_DIR / FILE, msgspec.to_builtins(Excluded(names, before.times + 1)))
        attempts.reopen_status(folder, "queued")
        job_file.write(folder, job_file.by_slurm(job_id))
    return job_id


def _read(run_dir: Path) -> Excluded:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((run_dir / STATE_DIR / FILE).read_bytes(), type=Excluded)
    return Excluded()
