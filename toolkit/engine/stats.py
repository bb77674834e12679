"""What a DP rank counts, and says of itself a few times a second: ``Stats``.

Knows no sockets (``link.py``) and no formats (``frontend/metrics.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.engine.messages import Stats

if TYPE_CHECKING:
    from toolkit.engine.eplb.manager import Manager
    from toolkit.engine.eplb.recorder import Recorder
    from toolkit.engine.scheduler import Scheduler


@dataclass
class SchedulerStats:
    """Counters since start; none of them falls."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


def stats_of(
    dp_rank: int, scheduler: Scheduler, steps: int, step_s: float, recorder: Recorder | None, eplb: Manager | None
) -> Stats:
    """``steps``, ``step_s``: forward passes since start, and the time in them; ``eplb``: on the first rank alone."""
    tables, counters = scheduler.tables, scheduler.stats
    return Stats(
        dp_rank=dp_rank,
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        kv_used_tokens=(tables.num_blocks - tables.num_free) * tables.page_size,
        kv_total_tokens=tables.num_blocks * tables.page_size,
        steps_total=steps,
        step_s_total=step_s,
        prompt_tokens_total=counters.prompt_tokens,
        cached_tokens_total=counters.cached_tokens,
        generated_tokens_total=counters.generated_tokens,
        preemptions_total=counters.preemptions,
        balancedness=recorder.history.last_balancedness if recorder is not None else math.nan,
        eplb=eplb.stats() if eplb is not None else None,
    )
