"""ExpConfig -> DeploymentPlan: workers, ranks, nodes, GPUs and every port. Pure: no I/O, no clock, no chance.

It does not know hosts (the launcher does, once it has nodes), commands (``adapters/``), or whether the plan is
sound (``check.py``). Read next: ``check.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolkit.config import ExpConfig
from toolkit.engine.dims import ParallelDims

FIXED_PORTS = 3  # HTTP, the frontend's inbox, torch.distributed


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
    """The ranks that run one model together. ``dist_port`` is on rank 0's node."""

    index: int
    dist_port: int
    ranks: tuple[RankPlan, ...]


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

    def ranks(self) -> Iterator[RankPlan]:
        for worker in self.workers:
            yield from worker.ranks

    def ports(self) -> dict[int, str]:
        """Every port of the deployment and what it is for."""
        used = {self.frontend.http_port: "frontend HTTP", self.frontend.inbox_port: "frontend inbox"}
        for worker in self.workers:
            used[worker.dist_port] = f"worker {worker.index} torch.distributed"
            used |= {rank.inbox_port: f"rank {rank.rank} inbox" for rank in worker.ranks}
        return used

    def to_json(self) -> dict[str, Any]:
        """``plan.json``."""
        return dataclasses.asdict(self)


def num_ports(cfg: ExpConfig) -> int:
    """How many consecutive ports a deployment takes."""
    return FIXED_PORTS + cfg.parallel.tp_size


def plan(cfg: ExpConfig, port_base: int) -> DeploymentPlan:
    """The deployment of ``cfg`` with its ports from ``port_base`` on.

    Ports differ between all processes, not only between those of one node, so that the same plan also
    runs on a single machine. Raises ``ValueError`` when the degrees of ``cfg.parallel`` do not fit together.
    """
    dims = ParallelDims.of(cfg.parallel)
    per_node = dims.tp_size if cfg.cluster.launcher == "local" else cfg.cluster.gpus_per_node
    assert per_node > 0, f"ranks per node is {per_node}"
    ranks = tuple(
        RankPlan(
            rank=rank,
            dp_rank=dims.dp_rank(rank),
            attn_tp_rank=dims.attn_tp_rank(rank),
            ep_rank=dims.ep_rank(rank),
            node=rank // per_node,
            local_rank=rank % per_node,
            inbox_port=port_base + FIXED_PORTS + rank,
        )
        for rank in range(dims.tp_size)
    )
    return DeploymentPlan(
        exp=cfg.exp,
        mapping=dims.mapping,
        launcher=cfg.cluster.launcher,
        device=cfg.cluster.device,
        num_nodes=ranks[-1].node + 1,
        num_gpus=dims.tp_size,
        workers=(WorkerPlan(0, port_base + 2, ranks),),
        frontend=FrontendPlan(0, cfg.deploy.host, port_base, port_base + 1),
    )
