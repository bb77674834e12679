"""Trigger: on the first rank, when to look for a better placement, and the plan when there is one.

Listens to the summed windows of the recorder; every ``eplb_rebalance_num_iterations`` passes, or when somebody asks,
it has the next placement planned beside the engine (planning.py). Owns no weights and decides for nobody:
what it found is proposed to all ranks by the manager. Read next: ``manager.py``.
L: layers, E: experts, R: slots.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.config.engine import EngineConfig
from toolkit.engine.eplb.placement import Placement
from toolkit.engine.eplb.planning import Answer, Ask, Planning
from toolkit.engine.eplb.pool import Pool
from toolkit.engine.eplb.windows import Summed, balancedness, merged

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

TOLERANCE = 0.01  # of online.Rules, which is not imported here: it compiles


@dataclass(frozen=True)
class Topology:
    """What a plan depends on beside the counts: EP ranks, the nodes they are on, expert groups of the gate."""

    ranks: int
    nodes: int
    groups: int

    def policy(self, asked: str) -> str:
        """The planner's policy; auto: hierarchical where there are nodes and they divide groups (DeepSeek's rule)."""
        fits = self.nodes > 1 and self.groups % self.nodes == 0 and self.ranks % self.nodes == 0
        return asked if asked != "auto" else "hierarchical" if fits else "global"


@dataclass(frozen=True)
class Reason:
    """Why a plan was asked for, and the counts' size.

    Attributes:
        measured: balancedness of what the slots really received in the passes looked at; NaN without any.
        passes, assignments: that the plan rests on.
    """

    trigger: Literal["iterations", "request"]
    asked: float
    measured: float
    passes: int
    assignments: int


class Trigger:
    """Args: ``spare`` and ``layers_per_chunk`` as in ``schedule.make_schedule``."""

    def __init__(self, engine: EngineConfig, placement: Placement, topology: Topology, spare: int) -> None:
        self._engine, self._placement, self._topology, self._spare = engine, placement, topology, spare
        self._fresh = engine.init_expert_location == "trivial"
        self._since: Summed | None = None  # summed up by the history's thread, so that a look is no sum of many
        self._lock = threading.Lock()
        self._pool = Pool(TOLERANCE, topology.ranks)
        self._planning = Planning()
        self._planning.start()
        self._asked: Reason | None = None
        self._number = 0
        self.skipped = 0  # looks that ended without a rebalance
        self.measured = float("nan")  # balancedness at the last look

    def listen(self, window: Summed) -> None:
        """Takes a window; called by another thread."""
        with self._lock:
            self._since = window if self._since is None else merged(self._since, window)

    @property
    def planning(self) -> bool:
        return self._asked is not None

    def poll(self) -> tuple[Answer, Reason] | None:
        """Called between steps: looks when it is time, and returns a plan that moves something, once."""
        if self._asked is not None:
            return self._take_answer(self._asked)
        since = self._since
        if since is not None and since.passes >= self._engine.eplb_rebalance_num_iterations:
            reason = self._look("iterations")
            limit = self._engine.eplb_min_rebalancing_utilization_threshold
            if not reason.assignments or (limit < 1 and reason.measured > limit):
                self.skipped += 1
            else:
                self._ask(reason, None)
        return None

    def request(self, target_LR: Ints | None) -> None:
        """Plans now: towards ``target_LR``, or what suits the counts.

        Raises:
            ValueError: a plan is being made, or nothing was counted that it could rest on.
        """
        if self._asked is not None:
            raise ValueError("a rebalance is being planned: wait for it to end")
        reason = self._look("request")
        if target_LR is None and not reason.assignments:
            raise ValueError("no expert was counted yet: send requests first, or give a placement")
        self._ask(reason, target_LR)

    def close(self) -> None:
        self._planning.close()

    def _look(self, trigger: Literal["iterations", "request"]) -> Reason:
        with self._lock:
            since, self._since = self._since, None
        if since is not None:
            self.measured = balancedness(since.slots_LP, self._topology.ranks)
            self._pool.add(since.counts_LE)
        counts = self._pool.counts() if self._pool else np.zeros(0, np.int64)
        return Reason(trigger, time.time(), self.measured, since.passes if since else 0, int(counts.sum()))

    def _ask(self, reason: Reason, target_LR: Ints | None) -> None:
        engine, topology, placement = self._engine, self._topology, self._placement
        self._number += 1
        self._asked = reason
        self._planning.ask(
            Ask(
                self._number,
                len(placement.phy2log_LP),
                self._pool.counts().tobytes() if reason.assignments else b"",
                placement.phy2log_LP.tobytes(),
                b"" if target_LR is None else target_LR.astype(np.int64).tobytes(),
                topology.ranks,
                topology.groups,
                topology.nodes,
                topology.policy(engine.eplb_algorithm),
                engine.eplb_transfer_budget,
                self._fresh,
                self._spare,
                engine.eplb_rebalance_layers_per_chunk,
            )
        )

    def _take_answer(self, reason: Reason) -> tuple[Answer, Reason] | None:
        answer = self._planning.answer()
        if answer is None:
            return None
        self._asked = None
        if answer.error:
            log.error("no rebalance: %s", answer.error)
        elif answer.ends:
            self._fresh = False
            return answer, reason
        self.skipped += 1
        return None
