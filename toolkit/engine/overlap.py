"""Two-batch overlap: the step's batch in two halves, one's communication beside the other's compute.

A layer is a generator of its stages (``Stages``): it yields where it may be left, and returns its result. ``finish``
runs one to its end; ``interleave`` runs two in turns. How a batch is cut and where the turns change are SGLang's
(two_batch_overlap.py, operations_strategy.py). Knows no models. Read next: ``models/decoder.py``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import accumulate
from typing import Literal, TypeVar

from toolkit.engine.core import Batch, ScheduledRequest

# Where a layer may be left: its queries are made; its experts are chosen; its rows are under way to the experts; the
# results are under way back; they have arrived.
Stage = Literal["prepared", "selected", "dispatched", "combining", "combined"]
R = TypeVar("R")
Stages = Generator[Stage, None, R]

PREFILL_TURNS: frozenset[Stage] = frozenset({"dispatched", "combining"})
DECODE_TURNS: frozenset[Stage] = frozenset({"prepared", "selected", "dispatched", "combining", "combined"})
DECODE_LEAD = 2  # turns by which the first half is ahead in decode; in prefill both start together
THRESHOLD = 0.48  # a prefill half with a smaller share of the tokens: one request is cut in two


def finish(stages: Stages[R]) -> R:
    """Runs all stages and returns the result."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            result: R = end.value
            return result


def interleave(first: Stages[R], second: Stages[R], is_extend: bool) -> tuple[R, R]:
    """Runs two equally long halves in turns, ``first`` ahead of ``second``."""
    turns, lead = (PREFILL_TURNS, 0) if is_extend else (DECODE_TURNS, DECODE_LEAD)
    results: dict[int, R] = {}

    def turn(half: int, stages: Stages[R]) -> None:
        if half in results:
            return
        try:
            while next(stages) not in turns:
                pass
        except StopIteration as end:
            results[half] = end.value

    for _ in range(lead):
        turn(0, first)
    while len(results) < 2:
        turn(0, first)
        turn(1, second)
    return results[0], results[1]


def split(batch: Batch) -> tuple[Batch, Batch]:
    """The two halves of a batch, in token order: the first is a prefix of the batch's tokens.

    Decode: half of the requests each. With prefill: the boundary between requests that is nearest to half of the
    tokens; when even that leaves one side with less than ``THRESHOLD`` of them, the request in the middle is cut.
    """
    if not batch.prefill:
        middle = len(batch.decode) // 2
        return Batch(batch.decode[:middle]), Batch(batch.decode[middle:])
    ends = [0, *accumulate(s.num_tokens for s in batch.scheduled)]
    total = ends[-1]
    # on ties the later boundary, so the first half is the larger one
    left = max(ends, key=lambda end: (-abs(2 * end - total), end))
    if not THRESHOLD * total <= left <= (1 - THRESHOLD) * total:
        left = total // 2
    return _part(batch, 0, left), _part(batch, left, total)


def _part(batch: Batch, begin: int, end: int) -> Batch:
    """The batch's tokens begin..end-1, requests at the borders cut."""
    decode = len(batch.decode)
    return Batch(
        tuple(_cut(batch.decode, begin, end)),
        tuple(_cut(batch.prefill, begin - decode, end - decode)),
    )


def _cut(scheduled: tuple[ScheduledRequest, ...], begin: int, end: int) -> Iterator[ScheduledRequest]:
    first = 0
    for s in scheduled:
        low, high = max(begin - first, 0), min(end - first, s.num_tokens)
        if low < high:
            yield ScheduledRequest(s.request, high - low, s.offset + low)
        first += s.num_tokens
