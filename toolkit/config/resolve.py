"""``resolve``: fills in the keys that depend on other keys, and logs each.

Relations between degrees and model shapes are not its business: ``engine/arch_check.py`` and ``launch/check.py``.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from toolkit.config.deploy import POOLS
from toolkit.config.engine import EngineConfig
from toolkit.config.experiment import GROUPS, ExpConfig
from toolkit.config.mapping import closest, from_mapping, refuse_unknown, to_mapping

log = logging.getLogger(__name__)


def resolve(config: ExpConfig, explicit: Collection[str] = ()) -> ExpConfig:
    """Fills in what depends on other keys and returns a new config; every change is logged.

    - ``cluster.device=auto`` becomes cuda where this host has NVIDIA's driver, cpu elsewhere.
    - ``cluster.device=cpu``: the keys of ``rehearsal`` replace the experiment's, except those in ``explicit``
      (what the user named on the command line: ``model``, ``load.osl``).
    - ``engine.moe_a2a_backend=none`` (SGLang's word) becomes ``allgather``.
    - ``model.dtype=auto`` becomes float32 on CPU and bfloat16 on GPUs.
    - ``deploy.mode=disagg``: ``deploy.decode.engine`` gets ``disable_radix_cache=true``, and the transfer backend is
      chosen where it is auto.
    - ``engine.init_expert_location`` becomes the file itself: results/EXP/latest is the next run's once that has begun.
    - ``model.path`` and ``cluster.results_dir`` lose ``~``; an empty ``model.tokenizer`` becomes ``model.path``.
    """
    values = to_mapping(config)
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"

    def put(group: str, key: str, value: Any) -> None:
        if values[group].get(key) != value:
            log.info("resolved %s.%s: %s -> %s", group, key, values[group].get(key), value)
            values[group][key] = value

    put("cluster", "device", device)
    if device == "cpu":
        for group, keys in config.rehearsal.items():
            if group not in GROUPS:
                raise ValueError(f"rehearsal.{group} is not a config group{closest(group, list(GROUPS))}")
            for key, value in keys.items():
                if group not in explicit and f"{group}.{key}" not in explicit:
                    put(group, key, value)
    if values["engine"]["moe_a2a_backend"] == "none":
        put("engine", "moe_a2a_backend", "allgather")
    if values["model"]["dtype"] == "auto":
        put("model", "dtype", "float32" if device == "cpu" else "bfloat16")
    for group, key in (("model", "path"), ("cluster", "results_dir")):
        if values[group][key]:
            put(group, key, str(Path(values[group][key]).expanduser()))
    placement = values["engine"]["init_expert_location"]
    if placement.endswith((".pt", ".json")) and Path(placement).expanduser().is_file():
        put("engine", "init_expert_location", str(Path(placement).expanduser().resolve()))
    if config.deploy.mode == "disagg":
        _resolve_disagg(values, explicit, put)
    if not values["model"]["tokenizer"]:
        put("model", "tokenizer", values["model"]["path"] or "bytes")
    return from_mapping(values, ExpConfig)


def _resolve_disagg(
    values: dict[str, Any], explicit: Collection[str], put: typing.Callable[[str, str, Any], None]
) -> None:
    ignored = sorted(name for name in explicit if name == "parallel" or name.startswith("parallel."))
    if ignored:
        raise ValueError(
            f"{ignored[0]} is of aggregated serving, deploy.mode=disagg has degrees for each pool: use "
            "parallel@deploy.prefill.parallel=CHOICE and parallel@deploy.decode.parallel=CHOICE, or "
            "deploy.prefill.parallel.KEY=VALUE"
        )
    deploy, cluster = values["deploy"], values["cluster"]
    for pool in POOLS:
        refuse_unknown(deploy[pool]["engine"], EngineConfig, f"deploy.{pool}.engine.")
    # What a rank has read of another's cache is only ever seen by its own request (engine/disagg/README.md says why).
    engine = {"disable_radix_cache": True}
    if deploy["decode"]["engine"].get("disable_radix_cache") is not True:
        log.info("resolved deploy.decode.engine.disable_radix_cache: -> True")
    deploy["decode"]["engine"] |= engine
    if deploy["disaggregation_transfer_backend"] == "auto":
        one_host = cluster["launcher"] == "local"
        put("deploy", "disaggregation_transfer_backend", "local" if one_host else "nixl")
