"""A job that met a bad node is submitted again without it (``cluster.exclude_bad_nodes``).

Called inside the job when its run has ended. The script is the one that was submitted; the nodes that any preflight of
this run has found bad are left out on sbatch's command line, beside those the user excludes. Owns
``launch/excluded.json``. Which node is bad, and why, is ``preflight.py``'s.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit import records
from toolkit.config import ExpConfig
from toolkit.launch import attempts, job_file, preflight, queue
from toolkit.launch.launcher import STATE_DIR

log = logging.getLogger(__name__)

FILE = "excluded.json"  # inside STATE_DIR
MOST = 3  # times that a run is submitted again: a fault of all nodes is none of any node


class Excluded(msgspec.Struct, frozen=True):
    nodes: list[str] = []
    times: int = 0


def submit_again(cfg: ExpConfig, run_dir: Path, others: Sequence[Path], script: Path) -> str:
    """The id of a new job for ``run_dir`` (and ``others``, which wait in the same one); empty: there is none.

    None where it is not wanted, where no node was found bad, or where that has happened too often.
    """
    bad = preflight.read_bad(run_dir)
    if not cfg.cluster.exclude_bad_nodes or not bad or not script.is_file():
        return ""
    before = _read(run_dir)
    names = [*dict.fromkeys([*before.nodes, *(node.host for node in bad)])]
    if before.times >= MOST:
        log.error("submitted %d times without bad nodes (%s): not again", MOST, ", ".join(names))
        return ""
    left_out = ",".join([cfg.cluster.exclude, *names] if cfg.cluster.exclude else names)
    try:
        job_id = queue.call("sbatch", "--parsable", f"--exclude={left_out}", str(script)).strip().partition(";")[0]
    except queue.SlurmError as error:
        log.error("not submitted again without %s: %s", ", ".join(names), error)
        return ""
    records.write_json(run_dir / STATE_DIR / FILE, msgspec.to_builtins(Excluded(names, before.times + 1)))
    log.warning("submitted again as job %s without %s", job_id, ", ".join(names))
    for folder in (run_dir, *others):
        attempts.reopen_status(folder, "queued")
        job_file.write(folder, job_file.by_slurm(job_id))
    return job_id


def _read(run_dir: Path) -> Excluded:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((run_dir / STATE_DIR / FILE).read_bytes(), type=Excluded)
    return Excluded()
