"""RankClient: what the frontend knows of the ranks of one worker.

Owns the table of open requests, start-up progress and replies to control operations. It does not know HTTP or text.
Read next: ``wire.py``, ``messages.py``, ``worker.py``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from toolkit.engine.args import WorkerAddress
from toolkit.engine.core import SamplingParams
from toolkit.engine.dims import ParallelDims
from toolkit.engine.frontend.flight import Sink
from toolkit.engine.frontend.wire import Wire
from toolkit.engine.messages import (
    Abort,
    Control,
    ControlReply,
    Failed,
    Generate,
    Handover,
    Output,
    Outputs,
    Progress,
    Ready,
    Stats,
    Ticket,
    ToFrontend,
    ToRank,
    decode_to_frontend,
)

log = logging.getLogger(__name__)


@dataclass
class RankStatus:
    """Start-up of one rank, as it reported it last."""

    rank: int
    stage: str = "start"
    done: int = 0
    total: int = 0
    ready: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class RankFlight:
    """Requests of one prompt to one DP rank. What comes of them goes to ``sink``.

    ``label``: the DP rank's number in its pool.
    """

    def __init__(self, client: RankClient, dp_rank: int, label: int, prompt: list[int], sink: Sink) -> None:
        assert 0 <= dp_rank < client.dp_size, dp_rank
        self.label = label
        self._client, self._dp_rank, self._prompt, self._sink = client, dp_rank, prompt, sink
        self._rids: list[str] = []

    def send(self, rid: str, sampling: SamplingParams) -> None:
        """Starts a request."""
        self._rids.append(rid)
        self._client.start(self._sink, self._dp_rank, Generate(rid, self._prompt, sampling))

    def abort(self, rid: str) -> None:
        """Ends a request on its rank, unless it has ended."""
        self._client.abort(rid)

    def close(self) -> None:
        """Ends those that have not ended."""
        for rid in self._rids:
            self.abort(rid)


class RankClient:
    """Talks to all ranks of one worker. Built inside a running event loop; ``close`` it.

    Args:
        on_stats: called with every ``Stats`` that arrives.
        first_rank: the number of the worker's rank 0 among all ranks of the deployment.
        timeout_s: a worker that says nothing for so long is given up until it speaks, and one whose connection breaks
            until all its ranks are ready again; 0: the launcher looks after it.

    Attributes:
        ranks: start-up state, by rank.
        kv: what each rank gave with ``Ready`` for peers to read its KV cache.
        stats: the latest ``Stats`` of each DP rank.
        failure: why the worker cannot serve; empty while it can. Cleared when every rank is ready anew.

    Raises:
        ValueError: the inbox's address cannot be bound.
    """

    def __init__(
        self,
        address: WorkerAddress,
        token: str,
        on_stats: Callable[[Stats], None],
        first_rank: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        self.name, self.pool = address.name, address.pool
        self._dims = ParallelDims.of(address.parallel)
        assert len(address.rank_inboxes) == self._dims.tp_size, (address.rank_inboxes, self._dims)
        self._token, self._on_stats = token, on_stats
        self._first_rank, self._timeout_s = first_rank, timeout_s
        self.ranks = [RankStatus(first_rank + rank) for rank in range(self._dims.tp_size)]
        self.kv = [b""] * self._dims.tp_size
        self.stats: dict[int, Stats] = {}
        self.failure = ""
        self._silent, self._heard = False, time.monotonic()
        self._flights: dict[str, tuple[Sink, int]] = {}
        self._replies: dict[str, dict[int, ControlReply]] = {}
        self._reply_arrived = asyncio.Condition()
        self._wire = Wire(address.inbox, address.rank_inboxes, token, self._broken if timeout_s else None)
        self._tasks = [asyncio.create_task(self._receive())]
        if timeout_s:
            self._tasks.append(asyncio.create_task(self._watch_silence()))

    @property
    def ready(self) -> bool:
        return all(status.ready for status in self.ranks)

    @property
    def down(self) -> str:
        """Why the worker cannot take requests now; empty when it can."""
        silent = f"{self.name} has said nothing for {self._timeout_s:g} s" if self._silent else ""
        return self.failure or silent or ("" if self.ready else f"{self.name} is not ready")

    @property
    def num_open(self) -> int:
        return len(self._flights)

    @property
    def dp_size(self) -> int:
        return self._dims.dp_size

    def kv_of(self, dp_rank: int) -> list[bytes]:
        """What a peer needs to read the KV cache of a DP group: of each of its ranks."""
        return [self.kv[rank] for rank in self._dims.dp_group(dp_rank)]

    def info_min(self, key: str) -> int:
        """The smallest value of a figure that every rank gave with ``Ready``."""
        return min(int(status.info[key]) for status in self.ranks)

    def start(self, sink: Sink, dp_rank: int, request: Generate) -> None:
        """Sends a request whose outputs go to ``sink``."""
        assert request.rid not in self._flights, request.rid
        self._flights[request.rid] = (sink, dp_rank)
        self._send(dp_rank, request)

    def hand_over(self, rid: str, ticket: Ticket) -> None:
        """Unknown: it has ended."""
        if rid in self._flights:
            self._send(self._flights[rid][1], Handover(rid, ticket))

    def forget(self, rid: str) -> None:
        """The request is over for this worker, though it did not say so."""
        self._flights.pop(rid, None)

    def abort(self, rid: str) -> None:
        """Unknown: it has ended."""
        found = self._flights.pop(rid, None)
        if found is not None:
            self._send(found[1], Abort(rid))

    async def control(self, control: Control, timeout_s: float) -> list[ControlReply]:
        """Has every rank carry it out and gives their replies, by rank. ``TimeoutError`` names the silent ranks."""
        cid = control.cid
        replies = self._replies[cid] = {}
        self._wire.send_all(control)
        try:
            async with asyncio.timeout(timeout_s), self._reply_arrived:
                await self._reply_arrived.wait_for(lambda: len(replies) == len(self.ranks) or bool(self.failure))
        except TimeoutError:
            silent = ", ".join(str(status.rank) for status in self.ranks if status.rank not in replies)
            raise TimeoutError(f"{control.op}: no reply from rank {silent} within {timeout_s:g} s") from None
        finally:
            del self._replies[cid]
        return [replies[rank] for rank in sorted(replies)]

    async def fail(self, reason: str) -> None:
        """Ends every open request and control operation with ``reason``; only the first failure is kept."""
        self.failure = self.failure or reason
        for rid, (sink, _) in self._flights.items():
            sink.put(Output(rid, [], finish="error", error=reason))
        async with self._reply_arrived:
            self._reply_arrived.notify_all()

    async def _lose(self, reason: str) -> None:
        """A process of the worker has ended, and so has the worker. It may come back as new processes."""
        if self.failure:
            return  # a peer of one that has failed fails too
        self._give_up(reason)
        await self.fail(reason)
        self.ranks = [RankStatus(self._first_rank + rank) for rank in range(self._dims.tp_size)]
        self._wire.connect_all()  # what was meant for the old processes must not reach the new ones

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._wire.close()

    def _broken(self, rank: int) -> None:
        if not self.failure:
            log.error("%s: the connection to rank %d is broken", self.name, rank)
            # apart: the caller is among the tasks that `_lose` ends
            self._tasks.append(asyncio.create_task(self._lose(f"{self.name} rank {rank}: its process has ended")))

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(self._timeout_s / 8)
            if self.ready and not self._silent and time.monotonic() - self._heard > self._timeout_s:
                self._silent = True
                log.error("%s", self.down)
                for rid, (_, dp_rank) in self._flights.items():
                    self._send(dp_rank, Abort(rid))  # in order behind its requests, if it ever goes on
                self._give_up(self.down)

    def _give_up(self, reason: str) -> None:
        """Ends all open requests here; other workers may take them."""
        flights, self._flights = self._flights, {}
        for rid, (sink, _) in flights.items():
            sink.put(Output(rid, [], finish="error", error=reason, retry=True))

    def _send(self, dp_rank: int, message: ToRank) -> None:
        """To the DP group's leader."""
        self._wire.send(self._dims.leader(dp_rank), message)

    async def _receive(self) -> None:
        try:
            while True:
                frames = await self._wire.receive()
                try:
                    message = decode_to_frontend(frames, self._token)
                except ValueError as error:
                    log.warning("message to the inbox refused: %s", error)
                    continue
                self._heard = time.monotonic()
                if self._silent:
                    self._silent = False
                    log.warning("%s speaks again", self.name)
                await self._handle(message)
                # A message that is already there is received without a turn of the event loop: let requests run.
                await asyncio.sleep(0)
        except Exception as error:
            log.exception("the rank inbox cannot go on")
            await self.fail(f"frontend: receiving from the ranks failed: {error}")

    async def _handle(self, message: ToFrontend) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    # Unknown: aborted while these tokens were on their way.
                    if (found := self._flights.get(output.rid)) is not None:
                        if output.finish is not None:
                            del self._flights[output.rid]
                        found[0].put(output)
            case Stats():
                self.stats[message.dp_rank] = message
                self._on_stats(message)
            case Progress():
                status = self.ranks[message.rank]
                status.stage, status.done, status.total = message.stage, message.done, message.total
            case Ready():
                status = self.ranks[message.rank]
                status.ready, status.info, status.stage = True, message.info, "ready"
                self.kv[message.rank] = message.kv
                log.info("rank %d is ready", status.rank)
                if self.failure and self.ready and self._timeout_s:
                    log.warning("%s is back", self.name)
                    self.failure = ""
            case ControlReply():
                if message.cid in self._replies:
                    async with self._reply_arrived:
                        self._replies[message.cid][message.rank] = message
                        self._reply_arrived.notify_all()
            case Failed():
                log.error("%s %d failed: %s", self.name, message.rank, message.error)
                await (self._lose if self._timeout_s else self.fail)(f"{self.name} {message.rank}: {message.error}")
