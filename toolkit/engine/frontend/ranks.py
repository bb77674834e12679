"""RankClient: the frontend's side of the wire to the ranks of one worker.

Owns the sockets, the table of open requests, start-up progress and replies to control operations, and keeps the
wake rule: whatever is sent, each rank gets exactly one message, its own or a ``Wake``, because all ranks take part
in the step that follows. It does not know HTTP or text. Read next: ``messages.py``, ``worker.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio

from toolkit.engine.args import FrontendArgs
from toolkit.engine.core import SamplingParams
from toolkit.engine.dims import ParallelDims
from toolkit.engine.messages import (
    Abort,
    Control,
    ControlReply,
    Failed,
    Generate,
    Output,
    Outputs,
    Progress,
    Ready,
    Stats,
    ToFrontend,
    ToRank,
    Wake,
    decode_to_frontend,
    encode,
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


class Flight:
    """Requests to one DP rank that belong together: what it sends, in order. A request's last output has ``finish``."""

    def __init__(self, client: RankClient, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        self._client = client
        self._rids: list[str] = []
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()

    def send(self, rid: str, prompt: list[int], sampling: SamplingParams) -> None:
        """Starts a request."""
        self._rids.append(rid)
        self._client.start(self, Generate(rid, prompt, sampling))

    def put(self, output: Output) -> None:
        self._outputs.put_nowait(output)

    async def next(self) -> Output:
        return await self._outputs.get()

    def abort(self, rid: str) -> None:
        """Ends a request on its rank, unless it has ended."""
        self._client.abort(rid)

    def close(self) -> None:
        for rid in self._rids:
            self.abort(rid)


class RankClient:
    """Talks to all ranks of one worker. Built inside a running event loop; ``close`` it.

    Args:
        on_stats: called with every ``Stats`` that arrives.

    Attributes:
        ranks: start-up state, by rank.
        stats: the latest ``Stats`` of each DP rank.
        failure: why the worker cannot serve; empty while it can. Never cleared.

    Raises:
        ValueError: the inbox's address cannot be bound.
    """

    def __init__(self, args: FrontendArgs, token: str, on_stats: Callable[[Stats], None]) -> None:
        self._dims = ParallelDims.of(args.parallel)
        assert len(args.rank_inboxes) == self._dims.tp_size, (args.rank_inboxes, self._dims)
        self._token, self._on_stats = token, on_stats
        self.ranks = [RankStatus(rank) for rank in range(self._dims.tp_size)]
        self.stats: dict[int, Stats] = {}
        self.failure = ""
        self._flights: dict[str, Flight] = {}
        self._replies: dict[str, dict[int, ControlReply]] = {}
        self._reply_arrived = asyncio.Condition()
        self._context = zmq.asyncio.Context()
        self._inbox = self._bind(args.inbox)
        # Plain sockets: with no high-water mark a send never waits, so one message and its wakes go out with
        # nothing in between, and each rank sees them in order.
        self._plain = zmq.Context(self._context)
        self._outboxes = [self._connect(address) for address in args.rank_inboxes]
        self._wake = encode(Wake(), token)
        self._receiving = asyncio.create_task(self._receive())

    @property
    def ready(self) -> bool:
        return all(status.ready for status in self.ranks)

    @property
    def num_open(self) -> int:
        return len(self._flights)

    def info_min(self, key: str) -> int:
        """The smallest value of a figure that every rank gave with ``Ready``."""
        return min(int(status.info[key]) for status in self.ranks)

    @contextlib.contextmanager
    def flight(self, dp_rank: int) -> Iterator[Flight]:
        """For requests to a DP rank. Leaving the block aborts those that have not ended."""
        assert 0 <= dp_rank < self._dims.dp_size, dp_rank
        flight = Flight(self, dp_rank)
        try:
            yield flight
        finally:
            flight.close()

    def start(self, flight: Flight, request: Generate) -> None:
        """Sends a request whose outputs go to ``flight``."""
        assert request.rid not in self._flights, request.rid
        self._flights[request.rid] = flight
        self._send(flight.dp_rank, request)

    def abort(self, rid: str) -> None:
        """Unknown: it has ended."""
        flight = self._flights.pop(rid, None)
        if flight is not None:
            self._send(flight.dp_rank, Abort(rid))

    async def control(self, control: Control, timeout_s: float) -> list[ControlReply]:
        """Has every rank carry it out and gives their replies, by rank. ``TimeoutError`` names the silent ranks."""
        cid = control.cid
        replies = self._replies[cid] = {}
        frames = encode(control, self._token)
        for outbox in self._outboxes:
            outbox.send_multipart(frames, zmq.NOBLOCK)
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
        for rid, flight in self._flights.items():
            flight.put(Output(rid, [], finish="error", error=reason))
        async with self._reply_arrived:
            self._reply_arrived.notify_all()

    async def close(self) -> None:
        self._receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiving
        for outbox in self._outboxes:
            outbox.close()
        self._inbox.close()
        self._context.term()

    def _bind(self, address: tuple[str, int]) -> zmq.asyncio.Socket:
        inbox = self._context.socket(zmq.PULL)
        inbox.setsockopt(zmq.RCVHWM, 0)
        inbox.setsockopt(zmq.LINGER, 0)
        host, port = address
        try:
            # ZeroMQ binds addresses, not names.
            inbox.bind(f"tcp://{socket.gethostbyname(host)}:{port}")
        except (OSError, zmq.ZMQError) as error:
            inbox.close()
            self._context.term()
            raise ValueError(
                f"inbox={host}:{port} cannot be bound ({error}): choose a free port of this host (cluster.port)"
            ) from None
        return inbox

    def _connect(self, address: tuple[str, int]) -> zmq.SyncSocket:
        outbox = self._plain.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.connect(f"tcp://{address[0]}:{address[1]}")
        return outbox

    def _send(self, dp_rank: int, message: ToRank) -> None:
        """``message`` to the DP group's leader, a ``Wake`` to every other rank of the worker."""
        leader = self._dims.leader(dp_rank)
        frames = encode(message, self._token)
        for rank, outbox in enumerate(self._outboxes):
            outbox.send_multipart(frames if rank == leader else self._wake, zmq.NOBLOCK)

    async def _receive(self) -> None:
        try:
            while True:
                frames = await self._inbox.recv_multipart()
                try:
                    message = decode_to_frontend(frames, self._token)
                except ValueError as error:
                    log.warning("message to the inbox refused: %s", error)
                    continue
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
                    if (flight := self._flights.get(output.rid)) is not None:
                        if output.finish is not None:
                            del self._flights[output.rid]
                        flight.put(output)
            case Stats():
                self.stats[message.dp_rank] = message
                self._on_stats(message)
            case Progress():
                status = self.ranks[message.rank]
                status.stage, status.done, status.total = message.stage, message.done, message.total
            case Ready():
                status = self.ranks[message.rank]
                status.ready, status.info, status.stage = True, message.info, "ready"
                log.info("rank %d is ready", message.rank)
            case ControlReply():
                if message.cid in self._replies:
                    async with self._reply_arrived:
                        self._replies[message.cid][message.rank] = message
                        self._reply_arrived.notify_all()
            case Failed():
                log.error("rank %d failed: %s", message.rank, message.error)
                await self.fail(f"rank {message.rank}: {message.error}")
