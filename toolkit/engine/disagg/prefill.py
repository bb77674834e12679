"""PrefillPart: computes prompts, gives tickets for their KV, and keeps the blocks until a reader has let go.

A request ends here with its first token. Its blocks are freed when the reader says so, when the frontend does
(``Abort``: it is not wanted, or goes another way), or when nobody has said anything for ``HOLD`` transfer timeouts.
With early tickets the reader fetches the first chunks of a prompt while the later ones are computed.
Read next: ``decode.py``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import msgspec

from toolkit.engine.core import Request
from toolkit.engine.disagg.part import MAX_BITS, bits, chosen
from toolkit.engine.kv.transfer import KVTransfer
from toolkit.engine.messages import Generate, Handover, Output, Send, Ticket
from toolkit.engine.pipeline import Step
from toolkit.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

HOLD = 3  # transfer timeouts until blocks nobody speaks of are taken back; readers have given up long before


@dataclass
class Room:
    """A request that is to be handed on."""

    send: Send
    came: float = field(default_factory=time.monotonic)
    began: float = 0.0  # of the first step that computed some of it
    announced: int = 0  # tokens in the last ticket
    epoch: int = 0
    kept: float = 0.0  # since when its blocks wait for a reader; 0: it is not computed yet


class PrefillPart:
    """See ``part.Part``."""

    def __init__(
        self,
        scheduler: Scheduler,
        transfer: KVTransfer,
        kv: bytes,
        leads: bool,
        timeout_s: float,
    ) -> None:
        self.kv, self._leads = kv, leads
        self._page_size = scheduler.tables.page_size
        self._scheduler, self._transfer, self._hold_s = scheduler, transfer, HOLD * timeout_s
        self._rooms: dict[str, Room] = {}
        self._kept: dict[str, Room] = {}  # in the order in which they were computed
        self._released: set[str] = set()  # rooms, as readers name them

    @property
    def busy(self) -> bool:
        return bool(self._kept)

    def take(self, message: Generate | Handover) -> Output | None:
        assert isinstance(message, Generate) and message.send is not None, message
        rid, send = message.rid, message.send
        refused = self._scheduler.add(rid, message.prompt, message.sampling, message.generated, handoff=True)
        if refused is None:
            self._rooms[rid] = Room(send)
        return refused

    def abort(self, rid: str) -> None:
        self._rooms.pop(rid, None)
        self._kept.pop(rid, None)
        self._scheduler.abort(rid)

    def poll(self) -> tuple[int, int]:
        self._transfer.attend(bool(self._kept) or any(room.announced for room in self._rooms.values()))
        if not self._leads:
            return -1, 0  # readers speak to the leader; the others have nothing against it
        self._released.update(self._transfer.released())
        now = time.monotonic()
        first = list(self._kept.values())[:MAX_BITS]
        arrived = bits(i for i, room in enumerate(first) if str(room.send.room) in self._released)
        return arrived, bits(i for i, room in enumerate(first) if now - room.kept > self._hold_s)

    def apply(self, arrived: int, lost: int) -> list[Output]:
        for rid in chosen(list(self._kept), arrived):
            room = self._kept.pop(rid)
            del self._rooms[rid]
            self._scheduler.abort(rid)
            self._released.discard(str(room.send.room))
        if lost:
            log.warning("nobody has read the KV of a request within %g s: its blocks are taken back", self._hold_s)
        if not self._kept:
            self._released.clear()  # of rooms that were aborted meanwhile
        return []

    def stepped(self, step: Step) -> list[Output]:
        for scheduled in step.batch.scheduled:
            room = self._rooms.get(scheduled.request.rid)
            if room is not None and not room.began:
                room.began = step.begin
        told = [self._told(output) for output in step.outputs]
        requests = [scheduled.request for scheduled in step.batch.scheduled]
        early = [(r, computed) for r, computed in zip(requests, step.computed) if r.rid not in self._kept]
        if early:
            step.settle()
        for request, computed in early:
            if (ticket := self._early(request, computed)) is not None:
                told.append(Output(request.rid, [], ticket=ticket))
        return told

    def flush(self) -> None:
        """What is measured here goes with the tickets."""

    def close(self) -> None:
        self._transfer.close()

    def _told(self, output: Output) -> Output:
        """A first token, with the ticket for its prompt unless it ended the request."""
        room = self._rooms.get(output.rid)
        if room is None:
            return output
        if output.finish is not None:
            del self._rooms[output.rid]
            return output
        request = self._scheduler.find(output.rid)
        assert request is not None and request.handoff, output.rid
        room.kept = now = time.monotonic()
        self._kept[output.rid] = room
        ticket = Ticket(
            room.send.room, len(request.tokens) - 1, request.blocks, request.preemptions, output.token_ids[0],
            room.began - room.came, now - room.began,
        )  # fmt: skip
        return msgspec.structs.replace(output, ticket=ticket)

    def _early(self, request: Request, computed: int) -> Ticket | None:
        """A ticket for the full blocks that a chunk has added: of ``computed`` tokens, not of those under way."""
        room = self._rooms.get(request.rid)
        if room is None or not room.send.early:
            return None
        full = computed // self._page_size
        if (full * self._page_size, request.preemptions) == (room.announced, room.epoch) or not full:
            return None
        room.announced, room.epoch = full * self._page_size, request.preemptions
        return Ticket(room.send.room, room.announced, [table[:full] for table in request.blocks], room.epoch)
