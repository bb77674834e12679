"""Pipeline: steps launched one after the other, the host at most one step behind the device.

While the device runs step n, the host schedules and launches step n + 1, and only then waits for the tokens of step n:
the device never waits for sampling, stop checks or replies. Where a launch itself waits for the device, as prefill over
DeepEP does in every layer, the host takes the tokens of step n there and not a whole prefill later. Where the next step
needs tokens that are not there yet (``Scheduler.can_run_ahead``), the host waits for them first. Without ``ahead`` each
step is waited for at once.
Knows runner and scheduler; neither network nor other ranks. Read next: ``worker.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.engine.core import Batch, InFlight, StepContext
from toolkit.engine.messages import Output
from toolkit.engine.runner import Launched, ModelRunner
from toolkit.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Step:
    """A step that is over.

    Attributes:
        began: Unix seconds: of its launch, or of the end of the step before, whichever came later.
        duration_s: from then until its tokens were there, so that durations add up.
        begin: of its launch, on the monotonic clock.
        computed: as ``InFlight`` has it.
        settle: waits until the device has done it; without sampled tokens it may be over on the host only.
    """

    number: int
    batch: Batch
    began: float
    duration_s: float
    outputs: list[Output]
    begin: float
    computed: tuple[int, ...]
    settle: Callable[[], None]


@dataclass(frozen=True)
class _Pending:
    ctx: StepContext
    in_flight: InFlight
    launched: Launched
    begin: float


class Pipeline:
    """The steps of one rank.

    Args:
        ahead: launch a step before the one before it is over.
        over: called with each step that is over, in order.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, ahead: bool, over: Callable[[Step], None]) -> None:
        self._runner, self._scheduler, self._ahead, self._over = runner, scheduler, ahead, over
        self._pending: _Pending | None = None
        self._ended = 0.0

    def before_schedule(self) -> None:
        """Waits for the step under way if the next one cannot be scheduled without its tokens."""
        if self._pending is not None and not self._scheduler.can_run_ahead:
            self.drain()

    def launch(self, batch: Batch, ctx: StepContext) -> None:
        """Starts a step, then takes the result of the one before it."""
        begin = time.perf_counter()
        launched = self._runner.launch(batch, ctx, self.drain)
        in_flight = self._scheduler.advance(batch)
        self.drain()
        self._pending = _Pending(ctx, in_flight, launched, begin)
        if not self._ahead:
            self.drain()

    def drain(self) -> None:
        """Waits for the step under way, if there is one, and takes its result."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        sampled = pending.launched.result()
        outputs = self._scheduler.resolve(pending.in_flight, sampled.tokens, sampled.logprobs)
        now = time.perf_counter()
        duration = now - max(pending.begin, self._ended)
        self._ended = now
        began = time.time() - duration
        step, settle = pending.in_flight, pending.launched.settle
        self._over(Step(pending.ctx.step, step.batch, began, duration, outputs, pending.begin, step.computed, settle))
