"""DecodePart: requests whose prompt another worker computes: reserve blocks, read its KV, join the batch.

A request first gets a place and blocks, in the order of arrival; then every rank of the group reads its heads' part of
whatever tickets allow; when all have all of it, the request joins between two steps. A request that is dropped on the
way keeps its blocks until nothing can be written into them any more. A failed read ends the request with ``retry``:
the frontend finds another way. Read next: ``kv/layout.py``, ``kv/transfer.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from toolkit.engine.core import Request
from toolkit.engine.disagg.log import TransferLog
from toolkit.engine.disagg.part import MAX_BITS, Cache, bits, chosen
from toolkit.engine.kv.layout import Blocks, CacheLayout, mismatch, pieces, sources
from toolkit.engine.kv.strategy import check_blocks
from toolkit.engine.kv.tables import NO_BLOCK
from toolkit.engine.kv.transfer import KVTransfer, Read
from toolkit.engine.messages import Generate, Handover, Output, Receive, Ticket
from toolkit.engine.pipeline import Step
from toolkit.engine.scheduler import Scheduler


@dataclass
class Running:
    """A read in flight, and since when."""

    read: Read
    began: float


@dataclass
class Arrival:
    """A request whose KV comes from elsewhere. Times are monotonic seconds; 0: not yet."""

    request: Request
    receive: Receive
    ticket: Ticket | None
    came: float = field(default_factory=time.monotonic)
    placed: float = 0.0
    clear: Callable[[], bool] = lambda: (
        False
    )  # steps launched before it was placed, which may still write there, are over
    known: float = 0.0  # the final ticket came
    ended: float = 0.0  # the last read has ended
    dropped: bool = False
    error: str = ""
    retry: bool = True
    epoch: int = 0
    started: int = 0  # leading blocks whose read was started
    reads: list[Running] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)  # of ended reads
    num_bytes: int = 0

    @property
    def final(self) -> bool:
        return self.ticket is not None and self.ticket.first_token is not None


class DecodePart:
    """See ``part.Part``. ``fence`` gives what tells whether the device has done all that was launched until now."""

    kv = b""

    def __init__(
        self,
        scheduler: Scheduler,
        transfer: KVTransfer,
        layout: CacheLayout,
        attn_tp_rank: int,
        timeout_s: float,
        transfers: TransferLog,
        fence: Callable[[], Callable[[], bool]],
    ) -> None:
        self._scheduler, self._transfer, self._layout = scheduler, transfer, layout
        self._rank, self._timeout_s, self._log, self._fence = attn_tp_rank, timeout_s, transfers, fence
        self._arrivals: dict[str, Arrival] = {}
        self._closing: dict[str, Arrival] = {}  # have a final ticket, or are dropped: what the bits are about
        self._caches: dict[bytes, Cache] = {}

    @property
    def busy(self) -> bool:
        return bool(self._closing) or any(arrival.reads for arrival in self._arrivals.values())

    def take(self, message: Generate | Handover) -> Output | None:
        if isinstance(message, Handover):
            arrival = self._arrivals.get(message.rid)
            if arrival is not None and not arrival.dropped:
                arrival.ticket = message.ticket
                self._close_when_final(arrival)
            return None
        receive = message.receive
        if receive is None:  # nobody computed its prompt: it is computed here
            return self._scheduler.add(message.rid, message.prompt, message.sampling, message.generated)
        refused = self._scheduler.refuse(message.rid, message.prompt)
        if refused is None:
            request = self._scheduler.incoming(message.rid, message.prompt, message.sampling, message.generated)
            arrival = self._arrivals[message.rid] = Arrival(request, receive, receive.ticket)
            self._close_when_final(arrival)
        return refused

    def abort(self, rid: str) -> None:
        arrival = self._arrivals.get(rid)
        if arrival is None:
            self._scheduler.abort(rid)
            self._log.decoded(rid, ended=True)
        elif not arrival.dropped:
            arrival.dropped = True
            self._closing[rid] = arrival

    def poll(self) -> tuple[int, int]:
        self._place()
        for arrival in self._arrivals.values():
            self._start(arrival)
            self._look(arrival)
        first = list(self._closing.values())[:MAX_BITS]
        self._transfer.attend(any(arrival.reads for arrival in self._arrivals.values()))
        ended = [i for i, arrival in enumerate(first) if self._has_ended(arrival)]
        return bits(ended), bits(i for i in ended if first[i].error)

    def apply(self, arrived: int, lost: int) -> list[Output]:
        outputs = []
        failed = set(chosen(list(self._closing), lost))
        for rid in chosen(list(self._closing), arrived):
            arrival = self._closing.pop(rid)
            del self._arrivals[rid]
            self._let_go(arrival)
            if rid in failed or arrival.dropped:
                self._scheduler.abort(rid)
            if arrival.dropped:
                continue
            if rid in failed:
                error = arrival.error or "another rank of the group could not read the KV cache"
                outputs.append(Output(rid, [], "error", error=error, retry=arrival.retry))
                continue
            assert arrival.ticket is not None and arrival.ticket.first_token is not None, arrival
            outputs.append(Output(rid, [], self._scheduler.join(rid, arrival.ticket.first_token), joined=True))
            self._log.joined(arrival)
        return outputs

    def stepped(self, step: Step) -> list[Output]:
        for output in step.outputs:
            self._log.decoded(output.rid)
        return step.outputs

    def flush(self) -> None:
        self._log.flush()

    def close(self) -> None:
        self._transfer.close()
        self._log.close()

    # --- one arrival ------------------------------------------------------------------------------

    def _close_when_final(self, arrival: Arrival) -> None:
        if arrival.final:
            arrival.known = time.monotonic()
            self._closing[arrival.request.rid] = arrival

    def _place(self) -> None:
        """Blocks for those that have none, in order, as far as there are places."""
        for arrival in self._arrivals.values():
            if arrival.placed or arrival.dropped:
                continue
            if not self._scheduler.place(arrival.request):
                return
            arrival.placed, arrival.clear = time.monotonic(), self._fence()

    def _start(self, arrival: Arrival) -> None:
        """Starts to read what the ticket allows and was not read yet."""
        ticket = arrival.ticket
        if not arrival.placed or arrival.dropped or arrival.error or ticket is None:
            return
        if not arrival.started and not arrival.clear():
            return
        if ticket.epoch != arrival.epoch:
            if arrival.reads:
                return  # what was computed again is read again, over what is still on its way
            arrival.epoch, arrival.started = ticket.epoch, 0
        size = self._layout.page_size
        ready = -(-ticket.num_tokens // size) if arrival.final else ticket.num_tokens // size
        if ready <= arrival.started:
            return
        wanted = [
            _blocks(mine, theirs, arrival.started, ready) for mine, theirs in zip(arrival.request.blocks, ticket.blocks)
        ]
        arrival.started = ready
        try:
            caches = [self._cache(peer) for peer in arrival.receive.peers]
            if wrong := next(filter(None, (mismatch(self._layout, cache.layout) for cache in caches)), ""):
                arrival.error, arrival.retry = wrong, False
                return
            for i in sources(self._layout, self._rank, [cache.layout for cache in caches]):
                counts = zip(wanted, self._layout.blocks, caches[i].layout.blocks)
                for (mine, theirs), num_mine, num_theirs in counts:
                    check_blocks(theirs, mine, num_theirs, num_mine)  # a ticket came over the network
                rows = pieces(self._layout, caches[i].layout, wanted)
                if len(rows):
                    began = time.monotonic()  # a read may end within its start
                    read = self._transfer.start_read(self._transfer.connect(caches[i].endpoint), rows)
                    arrival.reads.append(Running(read, began))
        except ValueError as error:
            arrival.error = str(error)

    def _cache(self, peer: bytes) -> Cache:
        """Raises ``ValueError``: it is none."""
        if peer not in self._caches:
            self._caches[peer] = msgspec.msgpack.decode(peer, type=Cache)
        return self._caches[peer]

    def _look(self, arrival: Arrival) -> None:
        """Takes account of reads that have ended; the first that fails ends them all."""
        for running in list(arrival.reads):
            state = self._transfer.poll(running.read)
            now = time.monotonic()
            if state == "running" and now - running.began > self._timeout_s:
                self._transfer.cancel(running.read)
                arrival.error = f"no end of a KV transfer within {self._timeout_s:g} s (deploy.transfer_timeout_s)"
            elif state == "running":
                continue
            elif state == "failed":
                arrival.error = arrival.error or f"KV transfer: {running.read.error}"
            arrival.reads.remove(running)
            ended = running.read.ended or now
            arrival.spans.append((running.began, ended))
            arrival.num_bytes += running.read.num_bytes
            arrival.ended = max(arrival.ended, ended)
        if arrival.error:
            for running in arrival.reads:
                self._transfer.cancel(running.read)
            arrival.reads.clear()

    def _has_ended(self, arrival: Arrival) -> bool:
        if arrival.reads:
            return False
        if arrival.dropped or arrival.error:
            return True
        assert arrival.ticket is not None, arrival
        return (
            bool(arrival.placed)
            and arrival.epoch == arrival.ticket.epoch
            and arrival.started > 0
            and (arrival.started == -(-arrival.ticket.num_tokens // self._layout.page_size))
        )

    def _let_go(self, arrival: Arrival) -> None:
        """Tells the other side's leader that its blocks are read, or never will be."""
        if self._rank == 0 and arrival.receive.peers:
            try:
                peer = self._transfer.connect(self._cache(arrival.receive.peers[0]).endpoint)
            except ValueError:
                return  # it is gone, or never was
            self._transfer.notify(peer, str(arrival.receive.room))


def _blocks(mine: Sequence[int], theirs: Sequence[int], begin: int, end: int) -> Blocks:
    """Blocks ``begin`` to ``end`` of one table each; those behind a window are not wanted here."""
    wanted = [i for i in range(begin, end) if mine[i] != NO_BLOCK]
    return Blocks([mine[i] for i in wanted], [theirs[i] for i in wanted])
