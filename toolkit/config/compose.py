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

from toolkit.config.deploy import POOLS
from toolkit.config.experiment import GROUPS, ExpConfig
from toolkit.config.mapping import from_mapping


def register_hydra_defaults() -> None:
    """Offers each group's defaults to Hydra as ``<group>/defaults``, so that a yaml holds only its choices."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for group, cls in GROUPS.items():
        node = OmegaConf.create(dataclasses.asdict(cls()))
        if group == "deploy":  # any engine key may be added there; `resolve` says which ones there are
            for pool in POOLS:
                node[pool].engine = OmegaConf.create({}, flags={"struct": False})
        store.store(group=group, name="defaults", node=node)


def from_omegaconf(node: Any) -> ExpConfig:
    """What Hydra composed -> ``ExpConfig``. Raises ``ValueError`` on an unknown key or a value of a wrong type."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=True)
    return from_mapping(typing.cast(dict[str, Any], plain), ExpConfig)


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
