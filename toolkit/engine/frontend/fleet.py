"""Fleet: all workers as the server sees them: which take a request, how they are, operations on every one.

With one aggregated worker a request is a ``RankFlight`` to one of its DP ranks; with pools it is a ``DisaggFlight``
(``disagg.py``). A worker that is down is passed over; whether the server can serve at all is judged here.
Knows neither HTTP nor text. Read next: ``ranks.py``, ``disagg.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from toolkit.engine.args import FrontendArgs
from toolkit.engine.frontend.disagg import DisaggFlight, Handoffs
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.flight import Sink, State
from toolkit.engine.frontend.ranks import RankClient, RankFlight, RankStatus
from toolkit.engine.frontend.router import ROUTERS, RouterPolicy
from toolkit.engine.messages import Control, ControlReply, Stats


@dataclass(frozen=True)
class Unit:
    """A DP rank of a pool: the ``index``-th of all its workers', and the ``number``-th of the whole deployment's."""

    client: RankClient
    dp_rank: int
    index: int
    number: int


class Pool:
    """Workers that do the same."""

    def __init__(self, clients: list[RankClient], first_number: int, router: RouterPolicy) -> None:
        self.clients, self._router = clients, router
        places = [(client, dp_rank) for client in clients for dp_rank in range(client.dp_size)]
        self.units = [Unit(client, dp, i, first_number + i) for i, (client, dp) in enumerate(places)]

    def pick(self, tokens: list[int], avoid: Collection[Unit] = ()) -> Unit | None:
        """The unit for a prompt, by the router; one of a living worker, and if possible none to ``avoid``."""
        for refused in (frozenset(avoid), frozenset[Unit]()):
            for _ in self.units:
                unit = self.units[self._router.pick(tokens)]
                if not unit.client.down and unit not in refused:
                    return unit
            for unit in self.units:  # a router may insist
                if not unit.client.down and unit not in refused:
                    return unit
        return None

    def observe(self, unit: Unit, stats: Stats) -> None:
        self._router.observe(msgspec.structs.replace(stats, dp_rank=unit.index))

    @property
    def down(self) -> str:
        """Why none of the workers can take requests; empty when one can."""
        reasons = [client.down for client in self.clients]
        return "; ".join(reasons) if all(reasons) else ""


FleetFlight = RankFlight | DisaggFlight


class Fleet:
    """Built inside a running event loop; ``close`` it. ``ValueError``: an inbox cannot be bound."""

    def __init__(self, args: FrontendArgs, token: str) -> None:
        make_router = ROUTERS[args.router]
        self._args = args
        self._started = False
        self._stopped = ""
        self.stats: dict[int, Stats] = {}  # the latest of each DP rank of the deployment, by its number
        self._units: dict[tuple[str, int], tuple[Pool, Unit]] = {}
        self.pools: dict[str, Pool] = {}
        first_rank = first_number = 0
        for name in dict.fromkeys(worker.pool for worker in args.workers):
            clients = []
            for worker in args.workers:
                if worker.pool == name:
                    clients.append(self._client(worker.name, first_rank, token))
                    first_rank += worker.parallel.tp_size
            size = sum(client.dp_size for client in clients)
            pool = self.pools[name] = Pool(clients, first_number, make_router(size, args.engine.random_seed))
            first_number += size
            self._units |= {(unit.client.name, unit.dp_rank): (pool, unit) for unit in pool.units}
        self._serving = self.pools["agg"] if "agg" in self.pools else self.pools["decode"]
        self._handoffs: Handoffs | None = None
        if "prefill" in self.pools:
            self._handoffs = Handoffs(
                self.pools["prefill"].pick, self.pools["decode"].pick, args.handoff, args.enforce_disagg,
                args.migration_limit,
            )  # fmt: skip

    def _client(self, name: str, first_rank: int, token: str) -> RankClient:
        (worker,) = (worker for worker in self._args.workers if worker.name == name)
        return RankClient(
            worker, token, lambda stats: self._observe(name, stats), first_rank, self._args.worker_timeout_s
        )

    def _observe(self, worker: str, stats: Stats) -> None:
        pool, unit = self._units[worker, stats.dp_rank]
        self.stats[unit.number] = msgspec.structs.replace(stats, dp_rank=unit.number)
        pool.observe(unit, stats)

    @property
    def clients(self) -> list[RankClient]:
        return [client for pool in self.pools.values() for client in pool.clients]

    def describe(self) -> list[dict[str, Any]]:
        """Each worker: what it does, the numbers of its DP ranks, why it is down, requests under way on it."""
        return [
            {
                "name": client.name,
                "pool": client.pool,
                "dp_ranks": [unit.number for _, unit in self._units.values() if unit.client is client],
                "down": client.down,
                "num_open": client.num_open,
            }
            for client in self.clients
        ]

    @property
    def ranks(self) -> list[RankStatus]:
        """Start-up state of all ranks of the deployment."""
        return [status for client in self.clients for status in client.ranks]

    @property
    def leader_stats(self) -> Stats | None:
        """Of the DP rank that speaks for its whole worker, of the first that generates."""
        return self.stats.get(self._serving.units[0].number)

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return self._handoffs.num_open if self._handoffs else sum(client.num_open for client in self.clients)

    @property
    def failure(self) -> str:
        """Why nothing can be served; empty when something can, or all are still loading."""
        if self._stopped:
            return self._stopped
        if self._started:
            return self._serving.down
        return next((client.failure for client in self.clients if client.failure), "")

    @property
    def state(self) -> State:
        """Loading until every worker was ready once; then ready as long as one lives that generates."""
        self._started = self._started or all(client.ready for client in self.clients)
        if self.failure:
            return "failed"
        return "ready" if self._started else "loading"

    def info_min(self, key: str) -> int:
        """The smallest value of a figure that ranks gave with ``Ready``, among those that hold whole requests."""
        return min(client.info_min(key) for client in self._serving.clients if client.ready)

    def admit(self, num_requests: int) -> None:
        """``ApiError`` 503 when so many more cannot be taken now."""
        if self.failure:
            raise ApiError(503, self.failure, code="failed")
        most = self._args.engine.max_queued_requests
        if self.num_open + num_requests > most:
            raise ApiError(
                503, f"{self.num_open} requests are open, engine.max_queued_requests={most}: try later, or raise it",
                code="overloaded", retry_after_s=1,
            )  # fmt: skip

    def open(self, prompt: list[int], num_requests: int, sink: Sink) -> FleetFlight:
        """For up to ``num_requests`` of one prompt; ``close`` it. ``ApiError``: see ``admit``."""
        self.admit(num_requests)
        if self._handoffs is not None:
            return DisaggFlight(self._handoffs, prompt, sink)
        unit = self._serving.pick(prompt) or self._serving.units[0]
        return RankFlight(unit.client, unit.dp_rank, unit.index, prompt, sink)

    def flight(self, prompt: list[int], num_requests: int, sink: Sink) -> contextlib.closing[FleetFlight]:
        """``open``, for a block: leaving it aborts those that have not ended."""
        return contextlib.closing(self.open(prompt, num_requests, sink))

    async def control(self, control: Control, timeout_s: float, pool: str | None = None) -> list[ControlReply]:
        """Has every rank of every living worker, or of one pool's, carry it out; replies by the ranks' numbers.

        ``TimeoutError``: a rank stays silent.
        """
        asked = [client for client in self.clients if pool in (None, client.pool)]
        living = [client for client in asked if not client.down or len(self.clients) == 1]
        answers = await asyncio.gather(*(client.control(control, timeout_s) for client in living))
        return [
            msgspec.structs.replace(reply, rank=client.ranks[reply.rank].rank)
            for client, replies in zip(living, answers)
            for reply in replies
        ]

    async def fail(self, reason: str) -> None:
        """Ends everything with ``reason``, for good."""
        self._stopped = self._stopped or reason
        for client in self.clients:
            await client.fail(reason)

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
