"""Prometheus metrics of the server, under the names of SGLang with the prefix ``wideep:``.

What ranks count comes from their latest ``Stats`` at scrape time; what only the server sees (latencies, HTTP) is
observed here. Latencies are for watching a server; a benchmark's are measured by its client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toolkit.engine.messages import EplbStats, Stats

PREFIX = "wideep:"

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

_GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("num_running_reqs", "Requests in the running batch", lambda s: s.running),
    ("num_queue_reqs", "Requests waiting for the running batch", lambda s: s.waiting),
    ("kv_used_tokens", "KV cache in use, tokens", lambda s: s.kv_used_tokens),
    ("token_usage", "KV cache in use, 0 to 1", lambda s: s.kv_used_tokens / s.kv_total_tokens),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens taken into the running batch", lambda s: s.prompt_tokens_total),
    ("cached_tokens", "Prompt tokens found in the prefix cache", lambda s: s.cached_tokens_total),
    ("generation_tokens", "Tokens generated", lambda s: s.generated_tokens_total),
    ("preemptions", "Requests pushed out of the running batch", lambda s: s.preemptions_total),
    ("engine_steps", "Forward passes", lambda s: s.steps_total),
    ("engine_step_seconds", "Time in forward passes", lambda s: s.step_s_total),
)
_EPLB_GAUGES: tuple[tuple[str, str, Callable[[EplbStats], float]], ...] = (
    ("eplb_moving", "1 while experts move between ranks", lambda s: s.state == "moving"),
    ("eplb_broken", "1 when experts cannot be moved any more", lambda s: s.state == "broken"),
    (
        "eplb_balancedness_before",
        "Of the last rebalance, for what it was planned from",
        lambda s: s.balancedness_before,
    ),
    ("eplb_balancedness_after", "Of the last rebalance, for what it was planned from", lambda s: s.balancedness_after),
    ("eplb_balancedness_measured", "Of the rows ranks received, at the last look", lambda s: s.balancedness_measured),
)
_EPLB_COUNTERS: tuple[tuple[str, str, Callable[[EplbStats], float]], ...] = (
    ("eplb_rebalances", "Rebalances that ended well", lambda s: s.rebalances_total),
    ("eplb_aborted", "Rebalances that were given up", lambda s: s.aborted_total),
    ("eplb_skipped", "Looks at the balance that moved nothing", lambda s: s.skipped_total),
    ("eplb_moved_slots", "Slots that got an expert from another rank", lambda s: s.moved_slots_total),
    ("eplb_same_node_bytes", "Weights moved inside nodes", lambda s: s.same_node_bytes_total),
    ("eplb_cross_node_bytes", "Weights moved between nodes", lambda s: s.cross_node_bytes_total),
    ("eplb_pause_seconds", "Time that steps of the first rank waited for moving experts", lambda s: s.pause_s_total),
)


class RankCollector(Collector):
    """The ranks' latest ``Stats`` as metric families, one sample a DP rank."""

    def __init__(self, stats: Callable[[], Mapping[int, Stats]], num_open: Callable[[], int]) -> None:
        self._stats, self._num_open = stats, num_open

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        stats = sorted(self._stats().items())
        for name, help_text, value in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, help_text, labels=["dp_rank"])
            for dp_rank, s in stats:
                gauge.add_metric([str(dp_rank)], value(s))
            yield gauge
        for name, help_text, value in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, help_text, labels=["dp_rank"])
            for dp_rank, s in stats:
                counter.add_metric([str(dp_rank)], value(s))
            yield counter
        balancedness = GaugeMetricFamily(
            PREFIX + "expert_balancedness", "Mean over layers of mean / max GPU load, last recorder window"
        )
        for _, s in stats:
            if not math.isnan(s.balancedness):
                balancedness.add_metric([], s.balancedness)
        yield balancedness
        yield from _eplb(next((s.eplb for _, s in stats if s.eplb is not None), None))
        yield GaugeMetricFamily(PREFIX + "num_open_reqs", "Requests the server holds", value=self._num_open())


def _eplb(state: EplbStats | None) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
    """Nothing without engine.enable_eplb; a figure that does not exist yet is left out."""
    if state is None:
        return
    for name, help_text, value in _EPLB_GAUGES:
        if not math.isnan(value(state)):
            yield GaugeMetricFamily(PREFIX + name, help_text, value=value(state))
    for name, help_text, value in _EPLB_COUNTERS:
        yield CounterMetricFamily(PREFIX + name, help_text, value=value(state))


class Sample(msgspec.Struct, frozen=True):
    """One figure of a metric of another process."""

    metric: str
    name: str
    labels: dict[str, str]
    value: float


class Metrics:
    """All metrics of one process, in a registry of its own. ``ranks``: where it talks to them."""

    def __init__(self, ranks: RankCollector | None = None) -> None:
        self._registry = CollectorRegistry()
        if ranks is not None:
            self._registry.register(ranks)
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "Request sent to its rank to first token", _TTFT_BUCKETS
        )
        self.itl = self._histogram("inter_token_latency_seconds", "Gaps between later tokens", _ITL_BUCKETS)
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "Request sent to its rank to last token", _E2E_BUCKETS
        )
        self.http = Counter(
            PREFIX + "http_requests", "HTTP requests answered", ["route", "code"], registry=self._registry
        )

    def samples(self) -> list[Sample]:
        """For ``render`` in another process."""
        return [Sample(m.name, s.name, s.labels, s.value) for m in self._registry.collect() for s in m.samples]

    def render(self, others: Sequence[Sample] = ()) -> bytes:
        """With those of other processes added."""
        total = CollectorRegistry()
        total.register(_Sum(self._registry, others))
        return generate_latest(total)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help_text, buckets=buckets, registry=self._registry)


class _Sum(Collector):
    """The metrics of a registry with samples of other processes added to its own."""

    def __init__(self, registry: CollectorRegistry, others: Sequence[Sample]) -> None:
        self._registry, self._others = registry, others

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            values = {(s.name, frozenset(s.labels.items())): s.value for s in metric.samples}
            for other in self._others:
                if other.metric == metric.name:
                    key = other.name, frozenset(other.labels.items())
                    # When a series began is told beside it: the earliest counts.
                    fold = min if other.name.endswith("_created") else float.__add__
                    values[key] = fold(values[key], other.value) if key in values else other.value
            total = Metric(metric.name, metric.documentation, metric.type)
            for (name, labels), value in values.items():
                total.add_sample(name, dict(labels), value)
            yield total
