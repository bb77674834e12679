"""ExpConfig -> DeploymentPlan: workers, ranks, nodes, GPUs and every port. Pure: no I/O, no clock, no chance.

It does not know hosts (the launcher does, once it has nodes), commands (``adapters/``), or whether the plan is
sound (``check.py``). Read next: ``check.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.config.experiment import ExpConfig
from toolkit.engine.dims import ParallelDims
from toolkit.launch.pools import AGG, Pool, worker_pools

FRONTEND_PORTS = 2  # HTTP, where the load generator's nodes meet
WORKER_PORTS = 2  # the frontend's inbox for the worker, torch.distributed
GPUS_AN_API_SERVER = 2  # an H200 generates 15,000 tokens/s, an API server answers with 30,000 (docs/performance.md)
MOST_API_SERVERS = 16  # one process still relays for all of them
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
    """The ranks that run one model together.

    Attributes:
        index: in the deployment.
        pool: ``agg``, ``prefill`` or ``decode``.
        name: ``rank`` where there is one worker, else the pool and the index in it: ``prefill0``. Processes carry it.
        mapping: ``DEP=32``.
        inbox_port: where the frontend hears this worker.
        dist_port: torch.distributed, on rank 0's node.
    """

    index: int
    pool: str
    name: str
    mapping: str
    inbox_port: int
    dist_port: int
    ranks: tuple[RankPlan, ...]


@dataclass(frozen=True)
class FrontendPlan:
    """``api_servers``: processes that answer at ``http_port``; 1: the frontend itself."""

    node: int
    host: str
    http_port: int
    api_servers: int

    @property
    def client_host(self) -> str:
        """Where a client on the frontend's node reaches it."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host


@dataclass(frozen=True)
class LoadgenPlan:
    """Nodes that send; the first one, the frontend's, leads and is joined by the others at ``port``."""

    nodes: tuple[int, ...]
    port: int


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
    loadgen: LoadgenPlan
    pools: tuple[PoolPlan, ...] = ()

    @property
    def main_worker(self) -> WorkerPlan:
        """The worker whose steps and expert counts are the run's: the one there is, or the first that decodes."""
        return next(worker for worker in self.workers if worker.pool != "prefill")

    def ranks(self) -> Iterator[RankPlan]:
        for worker in self.workers:
            yield from worker.ranks

    def ports(self) -> dict[tuple[int, int], str]:
        """Every (node, port) of the deployment and what it is for."""
        home = self.frontend.node
        used = {(home, self.frontend.http_port): "frontend HTTP"}
        used[self.loadgen.nodes[0], self.loadgen.port] = "load generator"
        for worker in self.workers:
            of = "" if worker.pool == AGG else f" of {worker.name}"
            used[home, worker.inbox_port] = f"frontend inbox{of}"
            used[worker.ranks[0].node, worker.dist_port] = f"torch.distributed{of}"
            used |= {(rank.node, rank.inbox_port): f"rank {rank.rank} inbox{of}" for rank in worker.ranks}
        return used

    def to_json(self) -> dict[str, Any]:
        """``plan.json``."""
        return dataclasses.asdict(self)


def api_servers(cfg: ExpConfig) -> int:
    """``deploy.api_servers``, or what the GPUs that generate need."""
    if cfg.deploy.api_servers or cfg.cluster.device == "cpu":
        return cfg.deploy.api_servers or 1
    gpus = sum(pool.workers * pool.parallel.tp_size for pool in worker_pools(cfg) if pool.name != "prefill")
    return min(-(-gpus // GPUS_AN_API_SERVER), MOST_API_SERVERS)


def num_ports(cfg: ExpConfig) -> int:
    """How many consecutive ports a deployment takes, on each of its nodes."""
    return FRONTEND_PORTS + sum(pool.workers * (WORKER_PORTS + pool.parallel.tp_size) for pool in worker_pools(cfg))


def pools(cfg: ExpConfig) -> tuple[PoolPlan, ...]:
    """The kinds of nodes of ``cfg``, in the order of their nodes; one, where all are alike."""
    if cfg.cluster.launcher == "local":
        return (PoolPlan(AGG, 0, 1),)
    found = [PoolPlan(FRONTEND, 0, 1)] if FRONTEND in cfg.cluster.pools else []
    for pool in worker_pools(cfg):
        first = found[-1].first_node + found[-1].num_nodes if found else 0
        last, _ = _places(pool, cfg.cluster.gpus_per_node)[-1][-1]
        found.append(PoolPlan(pool.name, first, last + 1))
    return tuple(found)


def plan(cfg: ExpConfig, port_base: int | Sequence[int]) -> DeploymentPlan:
    """The deployment of ``cfg`` with its ports from ``port_base`` on, one for all nodes or one for each.

    Ports differ between all processes, not only between those of one node, so that the same plan also
    runs on a single machine. Raises ``ValueError`` when the degrees of a pool do not fit together.
    """
    kinds = pools(cfg)
    num_nodes = kinds[-1].first_node + kinds[-1].num_nodes
    bases = [port_base] * num_nodes if isinstance(port_base, int) else port_base
    assert len(bases) == num_nodes, f"{len(bases)} first ports for {num_nodes} nodes"
    first_node = {kind.name: kind.first_node for kind in kinds}
    workers: list[WorkerPlan] = []
    port, gpu = FRONTEND_PORTS, 0
    for pool in worker_pools(cfg):
        if cfg.cluster.launcher == "local":
            placed = [[(0, gpu + i) for i in _span(pool, index)] for index in range(pool.workers)]
        else:
            home = first_node[pool.name]
            placed = [[(home + n, i) for n, i in places] for places in _places(pool, cfg.cluster.gpus_per_node)]
        for index, places in enumerate(placed):
            workers.append(_worker(pool, index, len(workers), places, bases, port))
            port += WORKER_PORTS + pool.parallel.tp_size
        gpu += pool.workers * pool.parallel.tp_size
    return DeploymentPlan(
        exp=cfg.exp,
        mapping=_mapping(workers),
        launcher=cfg.cluster.launcher,
        device=cfg.cluster.device,
        num_nodes=num_nodes,
        num_gpus=gpu,
        workers=tuple(workers),
        frontend=FrontendPlan(0, cfg.deploy.host, bases[0], api_servers(cfg)),
        loadgen=LoadgenPlan(tuple(i % num_nodes for i in range(cfg.load.nodes)), bases[0] + 1),
        pools=kinds,
    )


def _span(pool: Pool, index: int) -> range:
    """The ranks of a pool's worker, counted through the pool."""
    return range(index * pool.parallel.tp_size, (index + 1) * pool.parallel.tp_size)


def _places(pool: Pool, per_node: int) -> list[list[tuple[int, int]]]:
    """(node in the pool, GPU) of each rank of each worker. A worker that does not fit beside another begins a node."""
    assert per_node > 0, f"ranks per node is {per_node}"
    placed, gpu = [], 0
    for _ in range(pool.workers):
        if gpu % per_node + pool.parallel.tp_size > per_node:
            gpu += -gpu % per_node
        placed.append([divmod(gpu + rank, per_node) for rank in range(pool.parallel.tp_size)])
        gpu += pool.parallel.tp_size
    return placed


def _worker(
    pool: Pool, index: int, position: int, places: Sequence[tuple[int, int]], bases: Sequence[int], port: int
) -> WorkerPlan:
    """``port``: what the worker's ports have beyond their node's first."""
    dims = ParallelDims.of(pool.parallel)
    ranks = tuple(
        RankPlan(
            rank=rank,
            dp_rank=dims.dp_rank(rank),
            attn_tp_rank=dims.attn_tp_rank(rank),
            ep_rank=dims.ep_rank(rank),
            node=node,
            local_rank=local_rank,
            inbox_port=bases[node] + port + WORKER_PORTS + rank,
        )
        for rank, (node, local_rank) in enumerate(places)
    )
    name = "rank" if pool.name == AGG else f"{pool.name}{index}"
    return WorkerPlan(position, pool.name, name, dims.mapping, bases[0] + port, bases[places[0][0]] + port + 1, ranks)


def _mapping(workers: Sequence[WorkerPlan]) -> str:
    """``DEP=4``, or ``1 prefill DEP=4 + 2 decode DEP=32``."""
    if workers[0].pool == AGG:
        return workers[0].mapping
    kinds = [(worker.pool, worker.mapping) for worker in workers]
    return " + ".join(f"{kinds.count(kind)} {' '.join(kind)}" for kind in dict.fromkeys(kinds))
