"""ExpConfig -> DeploymentPlan: workers, ranks, nodes, GPUs and every port. Pure: no I/O, no clock, no chance.

It does not know hosts (the launcher does, once it has nodes), commands (``adapters/``), or whether the plan is
sound (``check.py``). Read next: ``check.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.config import ExpConfig
from toolkit.engine.dims import ParallelDims

FIXED_PORTS = 3  # HTTP, the frontend's inbox, torch.distributed
AGG = "agg"  # the pool of ranks that prefill and decode
FRONTEND = "frontend"  # a pool of one node for frontend and load generator, where cluster.pools has it


@dataclass(frozen=True)
class RankPlan:
    """One engine process. ``local_rank`` is its index on its node: its GPU, where ranks have GPUs."""

    rank: int
    dp_rank: int
    attn_tp_rank: int
    ep_rank: int
    node: int
    local_rank: int
    inbox_port: int


@dataclass(frozen=True)
class WorkerPlan:
    """The ranks that run one model together. ``dist_port`` is on rank 0's node; ``pool`` names its nodes."""

    index: int
    dist_port: int
    ranks: tuple[RankPlan, ...]
    pool: str = AGG


@dataclass(frozen=True)
class FrontendPlan:
    node: int
    host: str
    http_port: int
    inbox_port: int

    @property
    def client_host(self) -> str:
        """Where a client on the frontend's node reaches it."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host


@dataclass(frozen=True)
class PoolPlan:
    """Nodes of one kind: ``num_nodes`` from ``first_node`` on. A Slurm job has one component for each pool."""

    name: str
    first_node: int
    num_nodes: int


@dataclass(frozen=True)
class DeploymentPlan:
    """Everything about the processes of one deployment that follows from the config alone."""

    exp: str
    mapping: str
    launcher: str
    device: str
    num_nodes: int
    num_gpus: int
    workers: tuple[WorkerPlan, ...]
    frontend: FrontendPlan
    pools: tuple[PoolPlan, ...] = ()

    def ranks(self) -> Iterator[RankPlan]:
        for worker in self.workers:
            yield from worker.ranks

    def ports(self) -> dict[tuple[int, int], str]:
        """Every (node, port) of the deployment and what it is for."""
        f = self.frontend
        used = {(f.node, f.http_port): "frontend HTTP", (f.node, f.inbox_port): "frontend inbox"}
        for worker in self.workers:
            used[worker.ranks[0].node, worker.dist_port] = f"worker {worker.index} torch.distributed"
            used |= {(rank.node, rank.inbox_port): f"rank {rank.rank} inbox" for rank in worker.ranks}
        return used

    def to_json(self) -> dict[str, Any]:
        """``plan.json``."""
        return dataclasses.asdict(self)


def num_ports(cfg: ExpConfig) -> int:
    """How many consecutive ports a deployment takes, on each of its nodes."""
    return FIXED_PORTS + cfg.parallel.tp_size


def pools(cfg: ExpConfig) -> tuple[PoolPlan, ...]:
    """The kinds of nodes of ``cfg``, in the order of their nodes; one, where all are alike."""
    per_node = cfg.parallel.tp_size if cfg.cluster.launcher == "local" else cfg.cluster.gpus_per_node
    assert per_node > 0, f"ranks per node is {per_node}"
    first = 1 if cfg.cluster.launcher == "slurm" and FRONTEND in cfg.cluster.pools else 0
    ranks = PoolPlan(AGG, first, -(-cfg.parallel.tp_size // per_node))
    return (PoolPlan(FRONTEND, 0, 1), ranks) if first else (ranks,)


def plan(cfg: ExpConfig, port_base: int | Sequence[int]) -> DeploymentPlan:
    """The deployment of ``cfg`` with its ports from ``port_base`` on, one for all nodes or one for each.

    Ports differ between all processes, not only between those of one node, so that the same plan also
    runs on a single machine. Raises ``ValueError`` when the degrees of ``cfg.parallel`` do not fit together.
    """
    dims = ParallelDims.of(cfg.parallel)
    kinds = pools(cfg)
    home = kinds[-1]
    per_node = -(-dims.tp_size // home.num_nodes)
    num_nodes = home.first_node + home.num_nodes
    bases = [port_base] * num_nodes if isinstance(port_base, int) else port_base
    assert len(bases) == num_nodes, f"{len(bases)} first ports for {num_nodes} nodes"
    ranks = tuple(
        RankPlan(
            rank=rank,
            dp_rank=dims.dp_rank(rank),
            attn_tp_rank=dims.attn_tp_rank(rank),
            ep_rank=dims.ep_rank(rank),
            node=home.first_node + rank // per_node,
            local_rank=rank % per_node,
            inbox_port=bases[home.first_node + rank // per_node] + FIXED_PORTS + rank,
        )
        for rank in range(dims.tp_size)
    )
    return DeploymentPlan(
        exp=cfg.exp,
        mapping=dims.mapping,
        launcher=cfg.cluster.launcher,
        device=cfg.cluster.device,
        num_nodes=num_nodes,
        num_gpus=dims.tp_size,
        workers=(WorkerPlan(0, bases[home.first_node] + 2, ranks, home.name),),
        frontend=FrontendPlan(0, cfg.deploy.host, bases[0], bases[0] + 1),
        pools=kinds,
    )
