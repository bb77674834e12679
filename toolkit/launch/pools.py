"""Pools: the kinds of workers of a deployment, each with its own degrees and engine options.

Aggregated serving has one pool, ``agg``, of one worker; disaggregated serving has ``prefill`` and ``decode``. Pure.
Everything that plans, checks or starts workers goes over ``worker_pools(cfg)``, and so has
one case. Read next: ``plan.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.config.deploy import POOLS, PoolConfig
from toolkit.config.engine import EngineConfig
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping, to_mapping
from toolkit.config.parallel import ParallelConfig

AGG = "agg"


@dataclass(frozen=True)
class Pool:
    """Workers that are alike."""

    name: str
    workers: int
    parallel: ParallelConfig
    engine: EngineConfig

    @property
    def field(self) -> str:
        """What config keys of this pool begin with."""
        return "" if self.name == AGG else f"deploy.{self.name}."

    def view(self, cfg: ExpConfig) -> ExpConfig:
        """``cfg`` as an experiment of one worker of this pool."""
        return dataclasses.replace(cfg, parallel=self.parallel, engine=self.engine)


def worker_pools(cfg: ExpConfig) -> tuple[Pool, ...]:
    """The pools of ``cfg``, in the order of their workers.

    Raises:
        ValueError: a key of a pool's ``engine`` is unknown, or its value of a wrong type.
    """
    if cfg.deploy.mode == "agg":
        return (Pool(AGG, 1, cfg.parallel, cfg.engine),)
    return tuple(_pool(cfg, name, getattr(cfg.deploy, name)) for name in POOLS)


def _pool(cfg: ExpConfig, name: str, config: PoolConfig) -> Pool:
    values = to_mapping(cfg.engine)
    for key, value in config.engine.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    try:
        engine = from_mapping(values, EngineConfig)
    except ValueError as error:
        raise ValueError(f"deploy.{name}.engine.{error}") from None
    return Pool(name, config.workers, config.parallel, engine)


def named(pool: Pool, errors: Iterable[str]) -> list[str]:
    """``errors`` about keys of one pool, with the pool's own names for these keys."""
    return [
        f"{pool.field}{error}"
        if error.startswith(("parallel.", "engine."))
        else f"{pool.name} worker: {error}"
        if pool.field
        else error
        for error in errors
    ]
