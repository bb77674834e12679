"""What one run sees of a deployment that several runs share: links while it runs, then its own part, as files.

The processes write into the deployment's folder all along. While a run is served, its folder has links to what lies
there, so that ``jobs``, readers and a resume find everything where it always is, also when the launcher is killed. When
its load is over, each link is replaced by the part that is the run's: log lines, steps, transfers, samples and expert
windows since the load before it. Knows no processes. Used by ``deployment.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import records
from toolkit.launch.launcher import STATE_DIR, ProcessSpec
from toolkit.records.experts import read_experts, write_experts
from toolkit.records.samples import NodeSample
from toolkit.records.steps import StepRecord, TransferRecord
from toolkit.records.streams import read_stream, write_stream

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

FOLDER = "deployment"  # inside the folder of the first run
STREAMS: dict[str, tuple[type, str]] = {
    records.STEPS: (StepRecord, "t_begin"),
    records.TRANSFERS: (TransferRecord, "t_join"),
    records.NODE_SAMPLES: (NodeSample, "time"),
}
WHOLE = (*STREAMS, records.WORKERS, records.EXPERTS)  # what is linked as it is


class Share:
    """The parts of ``home``, one after the other: ``lend`` to a run folder, ``settle`` when its load is over."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.since = 0.0  # Unix seconds from which rows are the present run's
        self._log_sizes: dict[str, int] = {}
        self._pairs: dict[str, np.ndarray] = {}  # file -> what the loads before have counted
        self._all_settled = True

    def lend(self, run_dir: Path, specs: Sequence[ProcessSpec], files: Sequence[str]) -> None:
        """Puts links into ``run_dir``; what they point at may not be there yet."""
        states = [f"{STATE_DIR}/{spec.name}.json" for spec in specs]
        for name in (*WHOLE, *(spec.log for spec in specs), *states, *files):
            self._link(name, run_dir)

    def _link(self, name: str, run_dir: Path) -> None:
        """Of the run in whose folder home lies, links stay good where attempts.py moves them and what they point at."""
        link, target = run_dir / name, self._home / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent) if self._home.parent == run_dir else target)

    def settle(self, run_dir: Path, specs: Sequence[ProcessSpec], files: Sequence[str]) -> None:
        """Replaces the links. What cannot be cut out stays a link: nothing is lost."""
        until = time.time()
        parts = [(self._cut_log, spec.log) for spec in specs]
        parts += [(self._copy, f"{STATE_DIR}/{spec.name}.json") for spec in specs]
        parts += [(self._copy, name) for name in files]
        parts += [(self._cut_streams, name) for name in STREAMS] + [(self._cut_experts, records.EXPERTS)]
        workers = self._home / records.WORKERS
        for worker in _names(workers):
            name = f"{records.WORKERS}/{worker}"
            parts += [(self._cut_streams, f"{name}/{records.STEPS}"), (self._cut_experts, f"{name}/{records.EXPERTS}")]
        _unlink(run_dir / records.WORKERS)
        for cut, name in parts:
            try:
                _unlink(run_dir / name)
                if (self._home / name).exists():
                    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
                    cut(name, run_dir)
            except (OSError, ValueError) as error:
                log.warning("%s of this run stays in %s: %s", name, self._home, error)
                self._all_settled = False
                with contextlib.suppress(OSError):
                    shutil.rmtree(run_dir / name, ignore_errors=True)
                    self._link(name, run_dir)
        for folder in (Path(), *(Path(records.WORKERS) / worker for worker in _names(workers))):
            for name in (records.PROFILES, records.EXPERT_DUMPS):
                self._move(folder / name, run_dir)
        self.since = until

    def _cut_log(self, name: str, run_dir: Path) -> None:
        begin = self._log_sizes.get(name, 0)
        with (self._home / name).open("rb") as source, (run_dir / name).open("wb") as out:
            if begin:
                out.write(f"[its start and earlier loads: {self._home / name}]\n".encode())
            source.seek(begin)
            shutil.copyfileobj(source, out)
            self._log_sizes[name] = source.tell()

    def _copy(self, name: str, run_dir: Path) -> None:
        shutil.copy2(self._home / name, run_dir / name)

    def _cut_streams(self, name: str, run_dir: Path) -> None:
        from pyarrow import compute

        record, when = STREAMS[Path(name).name]
        for file in sorted((self._home / name).glob("*.arrows")):
            table = read_stream(file, record)
            rows = table.filter(compute.greater_equal(table.column(when), self.since))
            (run_dir / name).mkdir(exist_ok=True)
            write_stream(run_dir / name / file.name, rows)

    def _cut_experts(self, name: str, run_dir: Path) -> None:
        """Windows that ended since. Pairs are counted from the start on: what was there before is taken away."""
        found = read_experts(self._home / name)
        mine = found.times[:, 1] > self.since
        parts: dict[str, Any] = {"counts": found.counts[mine], "times": found.times[mine]}
        if found.slot_counts is not None:
            parts["slot_counts"] = found.slot_counts[mine]
        if found.pairs is not None:
            parts["pairs"] = found.pairs - self._pairs.get(name, 0)
            self._pairs[name] = found.pairs
        write_experts(run_dir / name, dataclasses.replace(found, **parts))

    def _move(self, name: Path, run_dir: Path) -> None:
        """What lies in the folder ``name`` was asked for during this run."""
        for found in (self._home / name).glob("*"):
            target = run_dir / name / found.name
            target.parent.mkdir(parents=True, exist_ok=True)
            found.rename(target)

    def over(self) -> None:
        """When no process writes any more and every run has its part: rows are not kept twice."""
        if not self._all_settled:
            return
        for folder in (self._home, *(self._home / records.WORKERS).glob("*")):
            for name in STREAMS:
                shutil.rmtree(folder / name, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _unlink(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
