"""What Slurm itself would refuse, or accept and never start, told before submission.

Asks ``sinfo`` and, where a site has accounting, ``sacctmgr``; says nothing where they are missing or do not answer,
because a check must not stand in the way of a cluster it does not understand. Called by ``check.py``.
"""

from __future__ import annotations

import dataclasses
import getpass
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolkit.config.cluster import ClusterConfig
from toolkit.config.experiment import ExpConfig
from toolkit.launch import estimate, queue
from toolkit.launch.plan import FRONTEND, PoolPlan, pools
from toolkit.launch.pools import worker_pools
from toolkit.launch.sbatch import pool_cluster
from toolkit.registry import unknown

ENDLESS = ("infinite", "UNLIMITED")
# Keys of cluster.* that a pool can have for itself: what is asked of Slurm for its nodes.
POOL_KEYS = frozenset(
    ("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "exclusive", "mem",
     "cpus_per_node", "gpus_by", "gpu_type", "segment", "extra_sbatch")
)  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """A partition as ``sinfo`` shows it. ``limit_min``: longest job, None without a limit."""

    name: str
    default: bool
    limit_min: float | None
    nodes: int


def check_slurm(cfg: ExpConfig, weight_bytes: int) -> Iterator[str]:
    """Errors of ``cfg``, which is for Slurm and whose degrees are sound."""
    yield from _options(cfg.cluster)
    yield from _time(cfg, weight_bytes)
    if errors := list(_pools(cfg)):
        yield from errors
        return
    partitions = ask_partitions()
    for pool in pools(cfg):
        cluster = pool_cluster(cfg, pool)
        if partitions:
            yield from _partition(cluster, pool, partitions)
        if cluster.account and (known := ask_accounts()) and cluster.account not in known:
            yield unknown("cluster.account", cluster.account, known)


def ask_partitions() -> list[Partition]:
    """What ``sinfo`` says; empty where there is no Slurm, or it does not answer."""
    if shutil.which("sinfo") is None:
        return []
    try:
        lines = queue.call("sinfo", "--noheader", "--format=%P|%l|%D").splitlines()
    except queue.SlurmError:
        return []
    found: dict[str, Partition] = {}
    for line in lines:
        name, limit, nodes = line.strip().split("|")
        known = found.get(name.rstrip("*"))
        count = int(nodes) + (known.nodes if known else 0)
        found[name.rstrip("*")] = Partition(name.rstrip("*"), name.endswith("*"), parse_minutes(limit), count)
    return list(found.values())


def ask_accounts() -> list[str]:
    """The user's accounts; empty where there is no accounting."""
    if shutil.which("sacctmgr") is None:
        return []
    try:
        text = queue.call(
            "sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={getpass.getuser()}", "format=account"
        )
    except queue.SlurmError:
        return []
    return sorted(set(text.split()))


def parse_minutes(limit: str) -> float | None:
    """``1-12:00:00``, ``8:00:00``, ``30:00`` -> minutes; None without a limit."""
    if limit in ENDLESS:
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _pools(cfg: ExpConfig) -> Iterator[str]:
    known = {field.name for field in dataclasses.fields(ClusterConfig)}
    pool_names = [*(pool.name for pool in worker_pools(cfg)), FRONTEND]
    for name, keys in cfg.cluster.pools.items():
        if name not in pool_names:
            yield unknown("cluster.pools", name, pool_names)
        for key in keys:
            if key not in known:
                yield f"cluster.pools.{name}.{key} is not a key of cluster"
            elif key not in POOL_KEYS:
                yield (
                    f"cluster.pools.{name}.{key}: pools can differ in {', '.join(sorted(POOL_KEYS))} only: "
                    f"set cluster.{key} for all"
                )
        if set(keys) <= POOL_KEYS:
            try:
                pool_cluster(cfg, PoolPlan(name, 0, 1))
            except ValueError as error:
                yield f"cluster.pools.{name}.{error}"


def _options(c: ClusterConfig) -> Iterator[str]:
    if c.time_min < 1:
        yield f"cluster.time_min={c.time_min} must be at least 1"
    if not 0 < c.signal_s < 65_536:
        yield f"cluster.signal_s={c.signal_s} must be 1 to 65535: Slurm's limits"
    elif c.signal_s >= 60 * c.time_min:
        yield (
            f"cluster.signal_s={c.signal_s} leaves nothing of cluster.time_min={c.time_min}: the run would be ended as "
            "it begins: use a longer limit or a smaller signal_s"
        )
    for field in ("extra_sbatch", "extra_srun"):
        for word in getattr(c, field):
            if not word.startswith("-"):
                yield f"cluster.{field}: {word!r} is not an option: write --name=value, each as one word of the list"
    if c.segment and c.segment < 1:
        yield f"cluster.segment={c.segment} must be a number of nodes, or 0"
    for role in c.role_env:
        if role not in ("rank", "frontend", "loadgen"):
            yield unknown("cluster.role_env", role, ["rank", "frontend", "loadgen"])


def _time(cfg: ExpConfig, weight_bytes: int) -> Iterator[str]:
    """The limit against the shortest time that the sweep can take."""
    if cfg.load.search:
        return
    least, limit = estimate.at_least(cfg, weight_bytes), 60 * cfg.cluster.time_min - cfg.cluster.signal_s
    if limit > 0 and least.total > limit:
        points = ", ".join(estimate.text(seconds) for seconds in least.points)
        way_out = ", or cluster.requeue=true to go on in a second job" if not cfg.cluster.requeue else ""
        if way_out or not least.points or max(least.points) + least.start > limit:
            enough = math.ceil((1.5 * least.total + cfg.cluster.signal_s) / 60)
            yield (
                f"cluster.time_min={cfg.cluster.time_min}: the sweep takes {estimate.text(least.total)} at the least "
                f"(start {estimate.text(least.start)}, points {points}), and {cfg.cluster.signal_s} s are kept to end "
                f"in order: use time_min={enough} or fewer requests{way_out}"
            )


def _partition(cluster: ClusterConfig, pool: PoolPlan, partitions: Sequence[Partition]) -> Iterator[str]:
    by_name = {partition.name: partition for partition in partitions}
    if not cluster.partition:
        if not any(partition.default for partition in partitions):
            known = ", ".join(sorted(by_name))
            yield f"cluster.partition is empty, and this cluster has no default: use one of: {known}"
            return
        chosen = next(partition for partition in partitions if partition.default)
    elif not set(cluster.partition.split(",")) <= set(by_name):
        wrong = next(name for name in cluster.partition.split(",") if name not in by_name)
        yield unknown("cluster.partition", wrong, list(by_name))
        return
    else:
        chosen = by_name[cluster.partition.split(",")[0]]
    if chosen.limit_min is not None and cluster.time_min > chosen.limit_min:
        yield (
            f"cluster.time_min={cluster.time_min}: partition {chosen.name} allows {chosen.limit_min:g} minutes: use "
            "less, or another cluster.partition"
        )
    if pool.num_nodes > chosen.nodes:
        yield (
            f"the plan needs {pool.num_nodes} nodes for {pool.name}, partition {chosen.name} has {chosen.nodes}: use "
            "another cluster.partition, fewer ranks, or more cluster.gpus_per_node"
        )
