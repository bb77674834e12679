"""``ExpConfig``: one experiment, all groups of keys together. Read next: ``resolve.py``, then ``launch/plan.py``."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config.cluster import ClusterConfig
from toolkit.config.deploy import DeployConfig
from toolkit.config.engine import EngineConfig
from toolkit.config.health import HealthConfig
from toolkit.config.load import LoadConfig
from toolkit.config.model import ModelConfig
from toolkit.config.options import opt
from toolkit.config.parallel import ParallelConfig


@dataclass(frozen=True)
class ExpConfig:
    """One experiment, complete."""

    exp: str = opt("adhoc", "name of the experiment: results/<exp>/<time>/")
    model: ModelConfig = opt(ModelConfig(), "")
    parallel: ParallelConfig = opt(ParallelConfig(), "")
    engine: EngineConfig = opt(EngineConfig(), "")
    deploy: DeployConfig = opt(DeployConfig(), "")
    cluster: ClusterConfig = opt(ClusterConfig(), "")
    health: HealthConfig = opt(HealthConfig(), "")
    load: LoadConfig = opt(LoadConfig(), "")
    rehearsal: dict[str, dict[str, Any]] = opt({}, "group -> keys that a CPU rehearsal of a GPU experiment replaces")
    variants: dict[str, dict[str, Any]] = opt(
        {}, "name -> group -> keys: run this experiment once for each, as <exp>-<name>, and compare with the first"
    )
    compare_with: str = opt("", "run folder (results/<exp>/latest) that the report compares this run with")
    dry_run: bool = opt(False, "print the plan and exit")
    resume: bool = opt(False, "go on with the newest run of this experiment: run only what is not done there")
    run_dir: str = opt("", "run folder; one that holds a run of this experiment is gone on with; empty: a new one")
    emit: Literal["", "sbatch"] = opt(
        "", "sbatch: make the run folder and the job script in it, print the script, submit nothing"
    )


GROUPS: dict[str, type] = {
    f.name: typing.get_type_hints(ExpConfig)[f.name]
    for f in dataclasses.fields(ExpConfig)
    if dataclasses.is_dataclass(typing.get_type_hints(ExpConfig)[f.name])
}
