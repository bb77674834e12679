"""What Hydra composes, and the configs that come of it.

The only module that knows OmegaConf; Hydra itself is met in ``launch/__main__.py``.
Read next: ``resolve.py``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.config.experiment import GROUPS, ExpConfig
from toolkit.config.mapping import from_mapping


def register_hydra_defaults() -> None:
    """Offers each group's defaults to Hydra as ``<group>/defaults``, so that a yaml holds only its choices."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for group, cls in GROUPS.items():
        node = OmegaConf.create(dataclasses.asdict(cls()))
        _open_dicts(node, cls())
        store.store(group=group, name="defaults", node=node)


def _open_dicts(node: Any, config: Any) -> None:
    """Lets keys be added where a config has a dict: ``cluster.env.NCCL_DEBUG=WARN`` without Hydra's ``+``."""
    from omegaconf import OmegaConf

    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            _open_dicts(node[f.name], value)
        elif isinstance(value, dict):
            node[f.name] = OmegaConf.create(value, flags={"struct": False})


def from_omegaconf(node: Any) -> ExpConfig:
    """What Hydra composed -> ``ExpConfig``. Raises ``ValueError`` on an unknown key or a value of a wrong type."""
    from omegaconf import OmegaConf

    plain = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    cluster = plain.get("cluster") or {}
    for environment in (cluster.get("env"), *(cluster.get("role_env") or {}).values()):
        for name, value in (environment or {}).items():
            if type(value) in (int, float):  # NCCL_MAX_NCHANNELS=8: YAML knows no better
                environment[name] = str(value)
    return from_mapping(plain, ExpConfig)


def variants(node: Any, overrides: list[str]) -> list[tuple[Any, list[str]]]:
    """What Hydra composed, once for each of its ``variants``; itself where it has none.

    A variant's keys replace the experiment's; its name is added to ``exp``; all but the first are compared with it.
    ``parallel=dep4`` is the aggregated variants' where others, with a mapping for each pool, are disaggregated.
    """
    from omegaconf import OmegaConf

    names = list(node.get("variants") or {})
    found: list[tuple[Any, list[str]]] = []
    for name in names:
        made = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
        made.variants = {}
        made = OmegaConf.merge(made, node.variants[name] or {})
        made.exp = f"{node.exp}-{name}"
        if name != names[0]:
            made.compare_with = str(Path(node.cluster.results_dir).absolute() / f"{node.exp}-{names[0]}" / "latest")
        found.append((made, [*overrides, f"variant={name}"]))
    if len({made.deploy.mode for made, _ in found}) > 1:
        for made, words in found:
            if made.deploy.mode == "disagg":
                words[:] = [word for word in words if not word.startswith(("parallel=", "parallel."))]
    return found or [(node, overrides)]


def read_saved(file: Path, overrides: Sequence[str]) -> Any:
    """A run folder's config.yaml as Hydra would have composed it, with ``overrides`` (``load.osl=8``), for a new run.

    What a rehearsal replaces was replaced when the file was written, and is not replaced again.
    """
    from omegaconf import OmegaConf

    new = {"rehearsal": None, "resume": False, "run_dir": "", "dry_run": False}
    node = OmegaConf.merge(OmegaConf.load(file), new)
    node.rehearsal = {}
    return OmegaConf.merge(node, OmegaConf.from_dotlist(list(overrides)))
