"""Manager: experts move between the ranks of a serving engine, chunk by chunk, and no rank uses a map another does not.

The protocol, in what each rank says of itself in the worker's ``agree`` (``proposal``): the first rank has a plan ->
all receive it and start the first chunk's transfers beside the steps -> a rank that has all of its weights says so ->
when all have said it, all commit the chunk between the same two steps -> when all have said that their copies are done,
they start the next one. One that failed says so too, and all drop the chunk: what was committed is a whole placement,
and serving goes on with it.
Pauses are what steps wait for: starting transfers and committing, on the host and on the device (at most their sum).
Read next: ``mover.py``, ``trigger.py``.
L: layers, R: slots.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb.mover import Mover
from toolkit.engine.eplb.planning import Answer
from toolkit.engine.eplb.recorder import Recorder
from toolkit.engine.eplb.schedule import SEND
from toolkit.engine.eplb.trigger import Reason, Trigger
from toolkit.engine.messages import EplbStats
from toolkit.records.experts import RebalanceRecord, append_rebalance

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

# What a rank says of itself. Anything but IDLE keeps all ranks awake.
IDLE, BUSY, READY, FAILED = 0, 1, 2, -1


@dataclass
class _Rebalance:
    """The one that goes on."""

    answer: Answer
    chunks: list[Ints]
    new_LR: Ints
    begin: float
    begin_step: int
    done: int = 0  # chunks committed
    changed: float = 0.0  # when the last one was, Unix seconds
    settling: bool = False  # committed, but the device may still copy
    pauses_s: list[float] = field(default_factory=list)
    transfers_s: list[float] = field(default_factory=list)
    link_s: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    posted: float = 0.0


class Manager:
    """EPLB of one rank.

    Args:
        broadcast: gives every rank what the first one passes.
        trigger: on the first rank; None on the others.
        folder: run folder that gets a line a rebalance; None: none.
    """

    def __init__(
        self, mover: Mover, recorder: Recorder, broadcast: Callable[[bytes], bytes], trigger: Trigger | None,
        folder: Path | None,
    ) -> None:  # fmt: skip
        self._mover, self._recorder, self._broadcast = mover, recorder, broadcast
        self._trigger, self._folder = trigger, folder
        if trigger is not None:
            recorder.history.listen = trigger.listen
        self._planned: tuple[Answer, Reason] | None = None  # on the first rank, until all have it
        self._reason: Reason | None = None
        self._now: _Rebalance | None = None
        self._writing: threading.Thread | None = None
        self._step = 0
        self._totals = EplbStats()
        self.pause_s = 0.0  # total, of this rank

    @property
    def proposal(self) -> int:
        """What this rank says of itself before a step."""
        if self._now is not None:
            if not self._mover.ready:
                return BUSY
            return FAILED if self._mover.failure else READY
        if self._trigger is None or self._mover.failure:
            return IDLE
        if self._planned is None:
            self._planned = self._trigger.poll()
        return READY if self._planned is not None else BUSY if self._trigger.planning else IDLE

    def turn(self, said: Sequence[int], step: int) -> None:
        """Between two steps: does what all ranks agreed on. ``said``: the proposals of all ranks, first rank first."""
        begin = time.perf_counter()
        self._step = step
        if self._now is None:
            if said[0] != READY:
                return
            self._now = now = self._begin()
            now.pauses_s.append(0.0)
        elif FAILED in said:
            self._end("aborted", f"rank {said.index(FAILED)} could not move experts, its log says why")
            return
        elif not all(one == READY for one in said):
            return
        elif self._now.settling:
            now = self._now
            self._settled(now)
        else:
            now = self._now
            self._commit(now)
            now.pauses_s.append(0.0)
        self._paused(now, time.perf_counter() - begin)
        if now.done == len(now.chunks) and not now.settling:
            self._end("done", "")

    def _paused(self, now: _Rebalance, seconds: float) -> None:
        self.pause_s += seconds
        now.pauses_s[-1] += seconds

    def request(self, placement: str) -> None:
        """Rebalances now. All ranks are asked; the first one plans.

        Args:
            placement: where experts are to go, JSON with ``physical_to_logical_map``; empty: what suits the counts.

        Raises:
            ValueError: it is no placement of this model, or cannot be done now.
        """
        target_LR = self._read(placement) if placement else None
        if self._mover.failure:
            raise ValueError(f"experts cannot be moved any more: {self._mover.failure}")
        if self._now is not None or self._planned is not None:
            raise ValueError("a rebalance is under way: wait for it to end")
        self._recorder.flush()  # the counts until now
        if self._trigger is not None:
            self._trigger.request(target_LR)

    def _read(self, placement: str) -> Ints:
        """The HTTP interface gives no access to files: JSON only."""
        held = self._mover.placement
        try:
            rows = msgspec.json.decode(placement, type=dict[str, list[list[int]]])["physical_to_logical_map"]
            new_LR = np.array(rows, np.int64)
        except (msgspec.DecodeError, KeyError, ValueError):
            raise ValueError("the placement is not JSON with physical_to_logical_map, lists of whole numbers") from None
        if new_LR.shape != held.phy2log_LP.shape:
            raise ValueError(
                f"the placement has shape {list(new_LR.shape)}, not {list(held.phy2log_LP.shape)} (MoE layers, slots)"
            )
        for layer, row in enumerate(new_LR):
            if set(row.tolist()) != set(range(held.num_experts)):
                raise ValueError(f"layer {layer} of the placement does not hold experts 0 to {held.num_experts - 1}")
        return new_LR

    @property
    def direct(self) -> bool:
        """Experts go straight into the memory of GPUs of this host."""
        return self._mover.direct

    @property
    def moving(self) -> bool:
        """A rebalance goes on; alike on all ranks."""
        return self._now is not None

    def nap(self) -> None:
        """Ranks that only wait for transfers or a plan need not turn as fast as they can."""
        if self._now is not None:
            self._mover.wait(0.005)
        else:
            time.sleep(0.005)

    def stats(self) -> EplbStats:
        """State and totals, for the frontend."""
        trigger, now = self._trigger, self._now
        state: Literal["waiting", "planning", "moving", "broken"] = "waiting"
        if self._mover.failure:
            state = "broken"
        elif now is not None:
            state = "moving"
        elif self._planned is not None or (trigger is not None and trigger.planning):
            state = "planning"
        return msgspec.structs.replace(
            self._totals, state=state, reason=self._mover.failure, pause_s_total=self.pause_s,
            chunk=now.done if now else 0, chunks=len(now.chunks) if now else 0,
            skipped_total=trigger.skipped if trigger else 0,
            balancedness_measured=trigger.measured if trigger else float("nan"),
        )  # fmt: skip

    def close(self) -> None:
        """Ends the planning process; what is to be written is written."""
        if self._trigger is not None:
            self._trigger.close()
        if self._writing is not None:
            self._writing.join(timeout=5.0)

    # --- one rebalance ------------------------------------------------------------------------------

    def _begin(self) -> _Rebalance:
        message = b""
        if self._planned is not None:
            answer, self._reason = self._planned
            message = msgspec.msgpack.encode(answer)
        self._planned = None
        answer = msgspec.msgpack.decode(self._broadcast(message), type=Answer)
        new_LR = answer.placement(len(self._mover.layers))
        now = _Rebalance(answer, answer.schedule().chunks, new_LR, time.time(), self._step)
        self._start_chunk(now)
        return now

    def _start_chunk(self, now: _Rebalance) -> None:
        now.posted = time.perf_counter()
        chunk, me = now.chunks[now.done], self._mover.placement.ep_rank
        now.sent_bytes.append(int(((chunk[:, 1] == SEND) & (chunk[:, 3] == me)).sum()) * self._mover.expert_bytes)
        self._mover.start(chunk, now.new_LR)

    def _commit(self, now: _Rebalance) -> None:
        now.transfers_s.append(time.perf_counter() - now.posted)
        now.changed = time.time()
        self._recorder.placement_changes()
        self._mover.commit()
        now.done += 1
        now.settling = True

    def _settled(self, now: _Rebalance) -> None:
        now.settling = False
        waited, beside = self._mover.seconds()
        self._paused(now, waited)
        now.link_s.append(beside)
        if now.done < len(now.chunks):
            self._start_chunk(now)

    def _end(self, state: Literal["done", "aborted"], why: str) -> None:
        now, self._now = self._now, None
        assert now is not None
        if state == "aborted":
            self._mover.drop()
            self._mover.failure = self._mover.failure or why
        if now.done:
            self._recorder.history.placement_changed(self._mover.placement.phy2log_LP, now.changed)
        record = self._record(now, state, why or self._mover.failure)
        totals = self._totals
        self._totals = msgspec.structs.replace(
            totals,
            rebalances_total=totals.rebalances_total + (state == "done"),
            aborted_total=totals.aborted_total + (state == "aborted"),
            moved_slots_total=totals.moved_slots_total + record.moved_slots,
            same_node_bytes_total=totals.same_node_bytes_total + record.same_node_bytes,
            cross_node_bytes_total=totals.cross_node_bytes_total + record.cross_node_bytes,
            balancedness_before=record.balancedness_before,
            balancedness_after=record.balancedness_after,
        )
        if self._trigger is not None:
            _tell(record)
            if self._folder is not None:
                self._writing = threading.Thread(target=append_rebalance, args=(self._folder, record), daemon=True)
                self._writing.start()

    def _record(self, now: _Rebalance, state: Literal["done", "aborted"], why: str) -> RebalanceRecord:
        moves = np.concatenate([np.zeros((0, 8), np.int64), *now.chunks[: now.done]])
        sends = moves[moves[:, 1] == SEND]
        expert_bytes = self._mover.expert_bytes * self._mover.moe_tp
        reason, answer = self._reason, now.answer
        return RebalanceRecord(
            number=answer.number,
            state=state,
            reason=why,
            trigger=reason.trigger if reason else "",
            t_asked=reason.asked if reason else now.begin,
            t_begin=now.begin,
            t_end=time.time(),
            plan_s=answer.seconds,
            first_step=now.begin_step,
            last_step=self._step,
            passes=reason.passes if reason else 0,
            assignments=reason.assignments if reason else 0,
            balancedness_measured=reason.measured if reason else float("nan"),
            balancedness_before=answer.before,
            balancedness_after=answer.after,
            balancedness_bound=answer.bound,
            layers=len(np.unique(moves[:, 0])),
            replanned_layers=answer.replanned,
            waiting_layers=answer.waiting,
            moved_slots=len(np.unique(moves[moves[:, 3] != moves[:, 4]][:, [0, 4, 6]], axis=0)),
            local_copies=int((moves[:, 1] != SEND).sum()),
            same_node_sends=int(sends[:, 7].sum()),
            cross_node_sends=int((1 - sends[:, 7]).sum()),
            same_node_bytes=int(sends[:, 7].sum()) * expert_bytes,
            cross_node_bytes=int((1 - sends[:, 7]).sum()) * expert_bytes,
            chunks=now.done,
            pauses_ms=[1e3 * pause for pause in now.pauses_s],
            transfers_ms=[1e3 * transfer for transfer in now.transfers_s],
            sent_bytes=now.sent_bytes[: now.done],
            link_ms=[1e3 * link for link in now.link_s],
        )


def _tell(record: RebalanceRecord) -> None:
    log.info(
        "rebalance %d %s%s: balancedness %.3f -> %.3f (bound %.3f), %d slots of %d layers in %d chunks, "
        "%.1f MB inside nodes, %.1f MB between them, longest pause %.2f ms",
        record.number, record.state, f" ({record.reason})" if record.reason else "", record.balancedness_before,
        record.balancedness_after, record.balancedness_bound, record.moved_slots, record.layers, record.chunks,
        record.same_node_bytes / 1e6, record.cross_node_bytes / 1e6, max(record.pauses_ms, default=0.0),
    )  # fmt: skip
