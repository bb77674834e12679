"""What a load point sends: how many calls, when each is due, what is in them. Pure but for the dataset it reads from.

Knows neither processes (``pool.py``) nor files (``sweep.py``). Every choice depends on the seed and the call's number.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from toolkit.config.load import LoadConfig
from toolkit.loadgen.datasets import Dataset, Sample
from toolkit.loadgen.exchange import Call
from toolkit.loadgen.openai_api import encode_body, output_tokens
from toolkit.loadgen.pool import Load


@dataclass(frozen=True)
class LoadPoint:
    """One load point: ``warmup`` calls, then ``measured`` ones.

    Attributes:
        concurrency: closed loop: calls in flight at a time; open loop: the most of them, 0 without a limit.
        request_rate: open loop: calls a second; 0: closed loop; -1: each sample says when (trace replay).
    """

    index: int
    concurrency: int
    warmup: int
    measured: int
    request_rate: float = 0.0
    repeat: int = 0

    @property
    def open_loop(self) -> bool:
        return self.request_rate != 0

    @property
    def name(self) -> str:
        if self.request_rate > 0:
            return f"{self.request_rate:g} requests/s"
        return "trace" if self.open_loop else f"concurrency {self.concurrency}"

    def load(self, options: LoadConfig) -> Load:
        return Load(self.index, self.concurrency, self.concurrency, self.open_loop, options.ramp_s)


def points_of(load: LoadConfig) -> list[LoadPoint]:
    """The sweep's points, in order; none where a search decides (``Search``)."""
    if load.search:
        return []
    if load.arrival == "trace":
        once = [LoadPoint(0, load.max_concurrency, 0, load.num_requests, -1.0)]
    elif load.request_rate:
        once = [rate_point(load, index, rate) for index, rate in enumerate(load.request_rate)]
    else:
        once = [closed_point(load, index, concurrency) for index, concurrency in enumerate(load.concurrency)]
    # The same load twice in a list is a repeat too; whole passes, so that what drifts with time is in every load.
    points = [replace(point, index=i) for i, point in enumerate(once * load.repeat)]
    loads = [(point.concurrency, point.request_rate) for point in points]
    return [replace(point, repeat=loads[:i].count(loads[i])) for i, point in enumerate(points)]


def most_in_flight(load: LoadConfig) -> int:
    """A guess, for the number of processes: under a rate without a cap, requests that take ten seconds."""
    if load.arrival == "trace":
        return load.max_concurrency or 1024
    if load.request_rate:
        return load.max_concurrency or round(10 * max(load.request_rate))
    return max(load.concurrency)


def closed_point(load: LoadConfig, index: int, concurrency: int) -> LoadPoint:
    warmup = concurrency if load.warmup_requests < 0 else load.warmup_requests
    measured = load.num_requests or max(load.min_requests, load.requests_per_slot * concurrency)
    return LoadPoint(index, concurrency, warmup, measured)


def rate_point(load: LoadConfig, index: int, rate: float) -> LoadPoint:
    """``num_requests`` calls, or as many as ``rate`` gives in ``duration_s``; a tenth of that before them warms up."""
    measured = load.num_requests or max(load.min_requests, round(rate * load.duration_s))
    warmup = -(-measured // 10) if load.warmup_requests < 0 else load.warmup_requests
    return LoadPoint(index, load.max_concurrency, warmup, measured, rate)


class Search:
    """Looks for the largest load that meets the objectives, between the smallest and the largest point asked for.

    Both ends are tried first; then what lies between the largest load that is known to be good and the smallest that
    is known not to be is halved (geometrically) until they are ``CLOSE`` to each other. Takes it for granted that more
    load is never better.
    """

    CLOSE = 1.1

    def __init__(self, load: LoadConfig) -> None:
        self._load = load
        self._rates = bool(load.request_rate)
        ends = load.request_rate if self._rates else load.concurrency
        self._low, self._high = float(min(ends)), float(max(ends))
        self.best = 0.0  # largest load that met the objectives; 0: none did
        self._worst = 0.0  # smallest that did not; 0: not known
        self._tried = 0
        self._asked = 0.0

    def next(self) -> LoadPoint | None:
        """The point to try now; None when the search is over."""
        value = self._value()
        if value is None:
            return None
        self._asked = value
        index, self._tried = self._tried, self._tried + 1
        if self._rates:
            return rate_point(self._load, index, value)
        return closed_point(self._load, index, round(value))

    def tell(self, good: bool) -> None:
        """Whether the point given last met the objectives."""
        if good:
            self.best = max(self.best, self._asked)
        else:
            self._worst = min(self._worst or self._asked, self._asked)

    def _value(self) -> float | None:
        if self._tried == 0:
            return self._low
        if not self.best or self.best >= self._high:
            return None
        if not self._worst:
            return self._high
        if self._worst / self.best <= self.CLOSE or (not self._rates and self._worst - self.best <= 1):
            return None
        middle = (self.best * self._worst) ** 0.5
        return float(f"{middle:.3g}") if self._rates else float(min(max(round(middle), self.best + 1), self._worst - 1))


def due_times(load: LoadConfig, rate: float, seed: int) -> Iterator[float]:
    """Seconds after the point's begin at which a call is due, without end.

    Gaps are constant, exponential (Poisson) or gamma with shape ``burstiness``; their mean is 1 / rate. For the first
    ``ramp_s`` seconds the rate grows linearly from zero: a time u of the even schedule moves to where the growing
    rate has offered as many calls, sqrt(2 * ramp_s * u) while u < ramp_s / 2, and u + ramp_s / 2 from there on.
    """
    rng = random.Random(f"arrivals/{seed}")
    shape = {"constant": 0.0, "poisson": 1.0, "gamma": load.burstiness}[load.arrival]
    even = 0.0
    while True:
        ramp = load.ramp_s
        yield even + ramp / 2 if even >= ramp / 2 else (2 * ramp * even) ** 0.5
        even += rng.gammavariate(shape, 1 / (rate * shape)) if shape else 1 / rate


class CallMaker:
    """Makes the calls of a run's points, one after the other, from one dataset."""

    def __init__(self, options: LoadConfig, dataset: Dataset, model: str) -> None:
        self._options = options
        self._model = model
        self._samples: Iterator[Sample] = iter(dataset)
        self._made = 0  # so far: each call's seed differs
        self._run_id = secrets.token_hex(3)  # makes request ids unique among load generators of one server

    def conversations(self, point: LoadPoint) -> Iterator[list[tuple[Call, bytes]]]:
        """The point's conversations: calls with their bodies, warm-up first. A conversation may exceed the count.

        Raises:
            ValueError: the dataset ends (a trace does) before a single call is made.
        """
        total = point.warmup + point.measured
        seed = self._options.seed + point.index
        due = due_times(self._options, point.request_rate, seed) if point.request_rate > 0 else None
        number = 0
        samples = self._samples
        while not total or number < total:
            turns = list(islice(samples, 1))
            if not turns:
                break
            while turns[-1].more_turns and (sample := next(samples, None)) is not None:
                turns.append(sample)
            at_s = next(due) if due is not None else turns[0].at_s
            yield [
                self._call(point, number + turn, turn, sample, at_s if turn == 0 else -1.0)
                for turn, sample in enumerate(turns)
            ]
            number += len(turns)
        if not number:
            raise ValueError("the dataset holds nothing more to send; give a larger one, or fewer load points")

    def skip(self, point: LoadPoint) -> None:
        """Passes over what ``point`` would send: the points after it then send the same with it or without it."""
        for _ in self.conversations(point):
            pass

    def _call(self, point: LoadPoint, number: int, turn: int, sample: Sample, at_s: float) -> tuple[Call, bytes]:
        options, seed = self._options, self._options.seed + self._made
        self._made += 1
        rng = random.Random(f"cancel/{seed}")
        call = Call(
            request_id=f"{self._run_id}-{point.index}-{number}",
            prompt_id=sample.id,
            warmup=number < point.warmup,
            expected_output_tokens=output_tokens(sample, options) if options.ignore_eos else 0,
            offset=0,
            length=0,
            at_s=at_s / options.speedup if point.request_rate < 0 else at_s,
            session=sample.session and f"{self._run_id}-{sample.session}",
            turn=turn,
            more_turns=sample.more_turns,
            think_s=sample.think_s,
            cancel_s=options.cancel_after_s if rng.random() < options.cancel_fraction else 0.0,
        )
        return call, encode_body(sample, options, self._model, seed)
