"""The engine-adapter seam: an experiment and its plan -> the processes of one engine, as strings.

An adapter is a pure function of its arguments: no I/O, so that ``dry_run`` shows exactly what would run and tests
compare it word by word. It does not start anything. Implementations: ``native.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from toolkit.config.experiment import ExpConfig
from toolkit.launch.launcher import ProcessSpec
from toolkit.launch.plan import DeploymentPlan
from toolkit.registry import Registry


@dataclass(frozen=True)
class Processes:
    """What an adapter asks for.

    Attributes:
        specs: the processes, in the order of their tasks.
        files: path inside the run folder -> content; written before anything is started.
    """

    specs: tuple[ProcessSpec, ...]
    files: Mapping[str, bytes]


class EngineAdapter(Protocol):
    def __call__(self, plan: DeploymentPlan, cfg: ExpConfig, hosts: Sequence[str], run_dir: Path) -> Processes:
        """The processes of ``plan``. ``hosts`` gives the address of each node, ``run_dir`` is absolute."""
        ...


def adapters() -> Registry[EngineAdapter]:
    """Adapters by ``engine.backend``."""
    from toolkit.launch.adapters import native

    table: Registry[EngineAdapter] = Registry("engine.backend")
    table.register("native")(native.processes)
    return table
