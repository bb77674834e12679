"""RestartingJob: a job whose workers are started anew when they have ended (``deploy.restart_workers``).

For disaggregated serving only, where the frontend does without a worker for a while: requests move on, and a worker
that is ready again is used again. One of aggregated serving takes the run with it. All ranks of a worker start
together, so those that outlive a peer are given ``LEAVE_S`` to notice; then the worker is dead for good. Knows no more
of a launcher than that ``start`` may be called again. Read next: ``watch.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.launch.launcher import WORKER_GROUP, Job, Launcher, ProcessSpec, ProcessState

log = logging.getLogger(__name__)

LEAVE_S = 30.0


class RestartingJob:
    """See ``launcher.Job``.

    Args:
        secrets: of the first start; the processes that come later need the same.
        limit: how often each worker may be started anew.
    """

    def __init__(self, job: Job, launcher: Launcher, run_dir: Path, secrets: Mapping[str, str], limit: int) -> None:
        self.specs = job.specs
        self._launcher, self._run_dir, self._secrets = launcher, run_dir, secrets
        self._jobs: list[Job] = [job]
        self._armed = False
        self._left = {spec.group: limit for spec in job.specs if spec.group.startswith(WORKER_GROUP)}
        self._latest: dict[str, Job] = {}  # of groups that were started anew
        self._since: dict[str, float] = {}  # when the first end of a group's process was seen

    def arm(self) -> None:
        """From now on: every worker was ready once, so that an end is no mistake of the configuration."""
        self._armed = True

    def poll(self) -> list[ProcessState]:
        states = self._poll()
        if not self._armed:
            return states
        hidden = set()  # groups that end, or have just been started anew
        for group in self._left:
            if self._look_after(group, [state for spec, state in zip(self.specs, states) if spec.group == group]):
                hidden.add(group)
        return [
            replace(state, state="starting") if spec.group in hidden else state
            for spec, state in zip(self.specs, states)
        ]

    def stop(self, grace_s: float) -> None:
        self._armed = False
        for job in reversed(self._jobs):
            job.stop(grace_s)

    def _poll(self) -> list[ProcessState]:
        """What each process's newest job says of it."""
        found = {state.name: state for state in self._jobs[0].poll()}
        for job in self._latest.values():
            found |= {state.name: state for state in job.poll()}
        return [found[spec.name] for spec in self.specs]

    def _look_after(self, group: str, states: Sequence[ProcessState]) -> bool:
        """Starts the group anew once all its processes have ended; True while that is under way."""
        if all(state.alive for state in states):
            self._since.pop(group, None)
            return False
        if not self._left[group]:
            return False
        since = self._since.setdefault(group, time.monotonic())
        if not any(state.alive for state in states):
            del self._since[group]
            self._left[group] -= 1
            self._start([spec for spec in self.specs if spec.group == group], group)
        elif time.monotonic() - since > LEAVE_S:
            log.error("%s: its processes do not end together within %g s: it is not started anew", group, LEAVE_S)
            self._left[group] = 0
            return False
        return True

    def _start(self, specs: Sequence[ProcessSpec], group: str) -> None:
        log.warning(
            "%s has ended: it is started anew (deploy.restart_workers: %d more)", specs[0].role, self._left[group]
        )
        for spec in specs:
            spec.state_file(self._run_dir).unlink(missing_ok=True)  # what it says is of the process before
        job = self._launcher.start(specs, self._run_dir, self._secrets)
        self._jobs.append(job)
        self._latest[group] = job
