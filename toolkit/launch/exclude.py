"""Nodes that a run must not get again: those its preflight found bad, those it lost.

Called inside the job when a run has ended. Bad nodes (``cluster.exclude_bad_nodes``): a new job for what is left, the
same but for ``--exclude`` in every component; so a task of an array, or a heterogeneous job, is like any other. A lost
node (``cluster.requeue``): the job itself starts again without it. Owns ``launch/excluded.json``. Which node is bad,
and why, is ``preflight.py``'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit import records
from toolkit.config import ExpConfig
from toolkit.launch import attempts, job_file, preflight, queue, sbatch
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.plan import pools

log = logging.getLogger(__name__)

FILE = "excluded.json"  # inside STATE_DIR
MOST = 3  # times that a run is submitted again: a fault of all nodes is none of any node


class Excluded(msgspec.Struct, frozen=True):
    nodes: list[str] = []
    times: int = 0


def submit_again(cfg: ExpConfig, run_dir: Path, others: Sequence[Path]) -> str:
    """The id of a new job for ``run_dir`` and then ``others``, which wait in the same one; empty: there is none.

    None where it is not wanted, where no node was found bad, or where that has happened too often.
    """
    bad = preflight.read_bad(run_dir)
    if not cfg.cluster.exclude_bad_nodes or not bad:
        return ""
    before = _read(run_dir)
    names = _joined(before, [node.host for node in bad])
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
        _write(folder, Excluded(names, before.times + 1))
        attempts.reopen_status(folder, "queued")
        job_file.write(folder, job_file.by_slurm(job_id))
    return job_id


def requeue(cfg: ExpConfig, run_dir: Path, lost: Sequence[str]) -> None:
    """Has Slurm start this job again, not on the nodes that are ``lost``: Slurm may not have missed them yet."""
    names = _joined(_read(run_dir), lost)
    wanted = set(queue.hostnames(cfg.cluster.nodelist)) if cfg.cluster.nodelist else set()
    names = [name for name in names if name not in wanted]  # the user insists on it: wait until it is back
    if lost:
        _write(run_dir, Excluded(names, _read(run_dir).times))
    excluded = {}
    job_id, kinds = os.environ["SLURM_JOB_ID"], pools(cfg)
    for index, pool in enumerate(kinds if names else ()):
        own = sbatch.pool_cluster(cfg, pool).exclude
        component = f"{job_id}+{index}" if int(os.environ.get("SLURM_HET_SIZE", "0")) else job_id
        excluded[component] = [own, *names] if own else names
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which Slurm sends at once; there is more to say to it
    try:
        queue.requeue(job_id, excluded)
    except queue.SlurmError as error:
        log.error("not started again as wished: %s", error)


def _joined(before: Excluded, names: Sequence[str]) -> list[str]:
    return [*dict.fromkeys([*before.nodes, *names])]


def _read(run_dir: Path) -> Excluded:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((run_dir / STATE_DIR / FILE).read_bytes(), type=Excluded)
    return Excluded()


def _write(run_dir: Path, excluded: Excluded) -> None:
    records.write_json(run_dir / STATE_DIR / FILE, msgspec.to_builtins(excluded))
