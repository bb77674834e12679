"""Between the runs of one allocation, or of one command: the deployment that stays up, because the next run has it too.

Starting an engine takes minutes to an hour; runs that differ in their load alone share one. Each keeps a folder of its
own, whole as if it had been alone. A deployment that is not as good as new after a load is not handed on: the next run
starts afresh. Knows which runs may share; what a run does is ``run.py``'s. Read next: ``deployment.py``, ``share.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

import msgspec
from rich.console import Console

from toolkit import records
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import to_mapping
from toolkit.launch.deployment import Deployment
from toolkit.launch.pools import worker_pools
from toolkit.launch.preflight import NODES_FILE
from toolkit.launch.show import say
from toolkit.records.files import write_json

T = TypeVar("T")

# Of an experiment's keys, those that no process of the deployment is started with.
OF_THE_RUN = ("load", "exp", "rehearsal", "variants", "run_dir", "resume", "emit", "dry_run", "compare_with")


def processes_key(cfg: ExpConfig) -> bytes:
    """Equal for experiments whose processes are the same."""
    values = {name: value for name, value in to_mapping(cfg).items() if name not in OF_THE_RUN}
    return msgspec.json.encode(values, order="deterministic")


def may_share(cfg: ExpConfig, following: ExpConfig) -> bool:
    """Whether ``following`` can be loaded on what ``cfg`` was.

    Not where experts move: the placement that one load leaves would be in the next one's figures.
    """
    moving = any(pool.engine.enable_eplb for pool in worker_pools(cfg))
    return not moving and processes_key(cfg) == processes_key(following)


def arranged(items: Sequence[T], cfg_of: Callable[[T], ExpConfig]) -> list[list[T]]:
    """``items`` by deployment, in the order in which each comes first."""
    found: dict[bytes, list[T]] = {}
    for item in items:
        found.setdefault(processes_key(cfg_of(item)), []).append(item)
    return list(found.values())


class Standing:
    """Has at most one deployment, in a run's hands or between two. Nothing runs any more at the end of its block.

    Before each run, ``expect`` says which one comes after it.
    """

    def __init__(self) -> None:
        self._following: ExpConfig | None = None
        self._up: Deployment | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def expect(self, following: ExpConfig | None) -> None:
        self._following = following

    def take(self, cfg: ExpConfig, run_dir: Path, console: Console) -> Deployment:
        """The deployment that is up, if ``cfg`` has the same and it is as good as new; else one yet to be started."""
        up = self._up
        if up is not None and processes_key(up.cfg) == processes_key(cfg):
            if up.fresh():
                _copy_facts(up.home.parent, run_dir)
                write_json(run_dir / records.PLAN, up.plan(cfg).to_json())
                say(console, f"The deployment is up: load {up.loads + 1} on the same processes")
                return up
            say(console, "The deployment is not well after the load before: starting afresh")
        self._end()
        self._up = Deployment(cfg, run_dir, shared=self._wanted(cfg))
        return self._up

    def give_back(self, run_dir: Path, healthy: bool) -> None:
        """After a load, however it went: it stays up if the next run has it too, else it is ended.

        Args:
            healthy: the load has ended in order.
        """
        up = self._up
        assert up is not None, "take() comes first"
        keep = healthy and self._wanted(up.cfg)
        if not keep:
            up.stop()
        up.settle(run_dir)
        if not keep:
            self._end()

    def _wanted(self, cfg: ExpConfig) -> bool:
        return self._following is not None and may_share(cfg, self._following)

    def _end(self) -> None:
        up, self._up = self._up, None
        if up is not None:
            up.close()


def _copy_facts(first_run: Path, run_dir: Path) -> None:
    """What the first run found out about the nodes."""
    if (first_run / NODES_FILE).exists():
        shutil.copy2(first_run / NODES_FILE, run_dir / NODES_FILE)
