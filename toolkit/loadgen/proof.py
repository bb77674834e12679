"""The load generator's own part in what it measured: what each process saw of itself, and the verdict over all.

A figure is only as good as the client that took it. ``Evidence`` is counted by every worker process for every load
point and adds up; ``judge`` turns the sum into a ``ClientProof`` (status.json) whose verdict is ``ok``, ``degraded``
(figures may be off by what the reasons say) or ``client_limited`` (they say more about the client than the server).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.records.status import ClientProof

BINS = 480
LOWEST_NS, HIGHEST_NS = 1e2, 1e11  # of the histograms: 0.1 µs to 100 s, each bin 4.4 % wide
_EDGES = np.geomspace(LOWEST_NS, HIGHEST_NS, BINS + 1)


class Histogram(msgspec.Struct):
    """Nanoseconds on a logarithmic scale: adds up over processes, and gives percentiles to 5 %."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    max_ns: int = 0

    def add(self, values: NDArray[np.int64]) -> None:
        if len(values):
            inside = np.clip(values, LOWEST_NS, HIGHEST_NS * 0.999)
            self.counts = (np.array(self.counts) + np.histogram(inside, _EDGES)[0]).tolist()
            self.max_ns = max(self.max_ns, int(values.max()))

    def merge(self, other: Histogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.max_ns = max(self.max_ns, other.max_ns)

    def percentile_ms(self, percent: float) -> float:
        """Upper edge of the bin that holds it, never above the largest value; 0 without values."""
        total = sum(self.counts)
        if not total:
            return 0.0
        position = int(np.searchsorted(np.cumsum(self.counts), total * percent / 100))
        return float(min(_EDGES[position + 1], max(self.max_ns, LOWEST_NS)) * 1e-6)


class Evidence(msgspec.Struct):
    """What one process counted in one load point; sums, but for ``cpu_share`` (the busiest process counts)."""

    token_chunks: int = 0
    output_tokens: int = 0
    coalesced_chunks: int = 0  # chunks that shared a read with the one before
    blurred_chunks: int = 0  # those of them that were read late, so that the client may be why
    unstamped: int = 0  # exchanges in which a read had no kernel stamp
    opened: int = 0  # connections opened inside the window
    resent: int = 0
    clock_steps: int = 0
    cpu_s: float = 0.0  # inside the window
    parse_cpu_s: float = 0.0
    window_s: float = 0.0
    cpu_share: float = 0.0
    in_flight_s: float = 0.0  # request seconds between ``full`` and ``drained``
    asked_s: float = 0.0  # the same if every slot had been busy all the time
    peak_rss_mb: float = 0.0
    clock_offset_ms: float = 0.0  # between the clock of its node and the leader's; its rows are moved by it
    count_mismatches: int = 0
    length_mismatches: int = 0
    lag: Histogram = msgspec.field(default_factory=Histogram)
    schedule_lag: Histogram = msgspec.field(default_factory=Histogram)

    def merge(self, other: Evidence) -> None:
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Histogram):
                mine.merge(theirs)
            elif name in ("cpu_share", "peak_rss_mb", "window_s", "clock_offset_ms"):
                setattr(self, name, max(mine, theirs))
            else:
                setattr(self, name, mine + theirs)


def in_flight(
    sent_ns: Sequence[int], ended_ns: Sequence[int], begin_ns: int, end_ns: int, slots: int
) -> tuple[float, float]:
    """(request seconds in flight between begin and end, those of ``slots`` busy slots)."""
    if end_ns <= begin_ns or not len(sent_ns):
        return 0.0, 0.0
    begins = np.clip(np.array(sent_ns, np.int64), begin_ns, end_ns)
    ends = np.clip(np.array(ended_ns, np.int64), begin_ns, end_ns)
    return float((ends - begins).sum() * 1e-9), slots * (end_ns - begin_ns) * 1e-9


VERDICTS = {
    "ok": "the load generator had no part in these figures",
    "degraded": "the load generator may have moved these figures (more cores for it, or less beside it, help)",
    "client_limited": "the load generator was the limit, not the server (give it more cores, nodes, or less load)",
}

# What is looked at, at which value it degrades the result, and at which it makes it the client's.
LIMITS: tuple[tuple[str, float, float, str], ...] = (
    ("blurred", 0.01, 0.05, "{:.1%} of the chunks were read late together with others: their times are upper bounds"),
    ("not_held", 0.02, 0.10, "{:.1%} of the concurrency asked for was not held: slots waited for their next request"),
    ("schedule_lag_p99_ms", 5.0, 50.0, "1 % of the requests were sent {:.1f} ms or more after they were due"),
    ("user_lag_p99_ms", 5.0, 50.0, "without kernel stamps times are the process's own, and 1 % are {:.1f} ms late"),
    ("cpu_share", 0.90, 0.98, "one of its processes was busy for {:.0%} of the time"),
    ("clock_steps", 1, np.inf, "the system clock was set {:.0f} times meanwhile"),
)


def judge(evidences: Iterable[Evidence], transport: str, workers: int) -> ClientProof:
    """The verdict of one load point over all processes."""
    total = Evidence()
    for evidence in evidences:
        total.merge(evidence)
    held = total.in_flight_s / total.asked_s if total.asked_s else 1.0
    blurred = total.blurred_chunks / max(1, total.token_chunks)
    lag_p99 = total.lag.percentile_ms(99)
    seen = {
        "blurred": blurred,
        "not_held": 1 - held,
        "schedule_lag_p99_ms": total.schedule_lag.percentile_ms(99),
        "user_lag_p99_ms": lag_p99 if total.unstamped else 0.0,
        "cpu_share": total.cpu_share if blurred > 0 or total.unstamped else 0.0,  # busy, and it shows
        "clock_steps": total.clock_steps,
    }
    verdict: Literal["ok", "degraded", "client_limited"] = "ok"
    reasons = []
    for name, degrades, limits, text in LIMITS:
        if seen[name] >= degrades:
            reasons.append(text.format(seen[name]))
            verdict = "client_limited" if seen[name] >= limits or verdict == "client_limited" else "degraded"
    return ClientProof(
        verdict=verdict,
        reasons=reasons,
        transport=transport,
        workers=workers,
        lag_p50_ms=total.lag.percentile_ms(50),
        lag_p99_ms=lag_p99,
        lag_max_ms=total.lag.max_ns * 1e-6,
        coalesced=total.coalesced_chunks / max(1, total.token_chunks),
        held=held,
        schedule_lag_p50_ms=total.schedule_lag.percentile_ms(50),
        schedule_lag_p99_ms=total.schedule_lag.percentile_ms(99),
        schedule_lag_max_ms=total.schedule_lag.max_ns * 1e-6,
        cpu_share=total.cpu_share,
        cpu_ms_per_1000_tokens=1e6 * (total.cpu_s + total.parse_cpu_s) / max(1, total.output_tokens),
        peak_rss_mb=total.peak_rss_mb,
        connections_opened=total.opened,
        resent=total.resent,
        clock_steps=total.clock_steps,
        clock_offset_ms=total.clock_offset_ms,
        token_count_mismatches=total.count_mismatches,
        length_mismatches=total.length_mismatches,
    )
