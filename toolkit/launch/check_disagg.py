"""What can be wrong with the two pools of disaggregated serving: options, and what both sides must have alike.

Called by ``check.py``, which checks each pool by itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from toolkit.config.experiment import ExpConfig
from toolkit.launch.pools import Pool, worker_pools
from toolkit.registry import unknown

TRANSFERS = ("local", "nixl")  # those of engine/kv/transfer.py, which needs torch (a test compares them)
ALIKE = ("page_size", "backend")  # a block must mean the same on both sides


def check_disagg(cfg: ExpConfig) -> Iterator[str]:
    """Sentences about ``deploy.*`` where ``deploy.mode`` is disagg."""
    deploy = cfg.deploy
    for name in ("transfer_timeout_s", "worker_timeout_s"):
        if getattr(deploy, name) <= 0:
            yield f"deploy.{name}={getattr(deploy, name)} must be positive: it is how a frozen peer is noticed"
    if deploy.migration_limit < 0:
        yield f"deploy.migration_limit={deploy.migration_limit} is negative: use 0 to never move a request on"
    if deploy.restart_workers < 0:
        yield f"deploy.restart_workers={deploy.restart_workers} is negative: use 0 to end the run with a worker"
    found = worker_pools(cfg)
    for pool in found:
        if pool.workers < 1:
            yield f"deploy.{pool.name}.workers={pool.workers} must be at least 1: use deploy=agg to do without pools"
    yield from _alike(*found)
    yield from _backend(cfg)


def _alike(prefill: Pool, decode: Pool) -> Iterator[str]:
    for key in ALIKE:
        ours, theirs = getattr(prefill.engine, key), getattr(decode.engine, key)
        if ours != theirs:
            yield (
                f"deploy.prefill.engine.{key}={ours} and deploy.decode.engine.{key}={theirs} differ, but KV blocks go "
                f"from one to the other as they are: use one value, engine.{key}, for both"
            )


def _backend(cfg: ExpConfig) -> Iterator[str]:
    backend, cluster = cfg.deploy.disaggregation_transfer_backend, cfg.cluster
    if backend not in TRANSFERS:
        yield unknown("deploy.disaggregation_transfer_backend", backend, ["auto", *TRANSFERS])
    if backend == "local" and cluster.launcher != "local":
        yield (
            "deploy.disaggregation_transfer_backend=local is memory that ranks of one host share, not for "
            f"cluster.launcher={cluster.launcher}, whose nodes are others: use nixl"
        )
    installed = any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl"))
    if backend == "nixl" and cluster.launcher == "local" and not installed:
        yield (
            "deploy.disaggregation_transfer_backend=nixl needs the package nixl-cu13 (pip install -e '.[nixl]'): "
            "install it, or use local"
        )
