"""Whose time it was: calls of kernels on streams, by hand."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from toolkit.engine.bench.rank import kernels_of
from toolkit.engine.bench.report import kernel_table
from toolkit.engine.bench.streams import NOTHING, Attribution, attributed

Call = tuple[str, int, float, float]


def rows(*calls: Call, steps: int = 1) -> dict[str, tuple[float, float, float, float]]:
    """Name -> us, calls, duration, beside."""
    names, streams, begins, ends = zip(*calls)
    found = attributed(names, streams, np.array(begins, np.float64), np.array(ends, np.float64), steps)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Attribution) == found, "it goes into a file"
    assert [k.us for k in found.kernels] == sorted((k.us for k in found.kernels), reverse=True)
    assert found.span_us == (max(ends) - min(begins)) / steps
    return {k.name: (k.us, k.calls, k.duration_us, k.beside_us) for k in found.kernels}


def test_kernels_that_follow_each_other_have_their_durations() -> None:
    assert rows(("b", 7, 10, 25), ("a", 7, 0, 10)) == {"a": (10, 1, 10, 0), "b": (15, 1, 15, 0)}


def test_a_chained_kernel_waits_in_the_time_of_the_one_before() -> None:
    """Three begin at once and end one after the other: the waits of 10 and 25 us are nobody's twice."""
    found = rows(("a", 7, 0, 10), ("b", 7, 0, 25), ("c", 7, 0, 30))
    assert found == {"a": (10, 1, 10, 0), "b": (15, 1, 25, 0), "c": (5, 1, 30, 0)}
    assert sum(us for us, *_ in found.values()) == 30


def test_a_kernel_inside_another_one_adds_nothing() -> None:
    found = rows(("long", 7, 0, 30), ("inside", 7, 10, 20), ("after", 7, 25, 40))
    assert found == {"long": (30, 1, 30, 0), "after": (10, 1, 15, 0), "inside": (0, 1, 10, 0)}


def test_gaps_have_a_row_of_their_own() -> None:
    found = rows(("a", 7, 5, 10), ("a", 7, 12, 20), ("b", 7, 28, 30))
    assert found == {"a": (13, 2, 13, 0), NOTHING: (10, 2, 10, 0), "b": (2, 1, 2, 0)}


def test_streams_are_taken_one_by_one_and_what_ran_beside_is_told() -> None:
    """Stream 8 hides the gap of stream 7, but for one microsecond."""
    found = rows(("a", 7, 0, 10), ("b", 7, 16, 20), ("copy", 8, 6, 15))
    assert found == {"a": (10, 1, 10, 4), "copy": (9, 1, 9, 4), "b": (4, 1, 4, 0), NOTHING: (1, 1, 1, 0)}


def test_three_streams_at_once() -> None:
    found = rows(("a", 1, 0, 10), ("b", 2, 5, 15), ("c", 3, 8, 9))
    assert found == {"a": (10, 1, 10, 5), "b": (10, 1, 10, 5), "c": (1, 1, 1, 1)}


def test_figures_are_of_a_step() -> None:
    found = rows(("a", 7, 0, 10), ("a", 7, 12, 20), steps=2)
    assert found == {"a": (9, 1, 9, 0), NOTHING: (1, 0.5, 1, 0)}


def test_nothing_was_recorded() -> None:
    assert attributed([], [], np.empty(0), np.empty(0), 3) == Attribution([], 0.0)


def test_of_a_profile_only_what_the_gpu_did_is_counted() -> None:
    """torch's own events: the launch on the host and the range that somebody named lie over the kernels."""

    class Profiled:
        def events(self) -> list[FunctionEvent]:
            cuda = {"thread": 1, "device_type": DeviceType.CUDA}
            return [
                FunctionEvent(1, "launch", 1, 0.0, 90.0),
                FunctionEvent(
                    2, "step", start_us=5.0, end_us=80.0, device_resource_id=7, is_user_annotation=True, **cuda
                ),
                FunctionEvent(3, "a", start_us=10.0, end_us=30.0, device_resource_id=7, **cuda),
                FunctionEvent(4, "b", start_us=12.0, end_us=40.0, device_resource_id=7, **cuda),
                FunctionEvent(5, "copy", start_us=35.0, end_us=50.0, device_resource_id=20, **cuda),
            ]

    found = kernels_of(Profiled(), 2)
    assert [(k.name, k.us, k.duration_us) for k in found.kernels] == [
        ("a", 10, 10), ("copy", 7.5, 7.5), ("b", 5, 14),
    ]  # fmt: skip
    assert found.span_us == found.busy_us == 20


@pytest.mark.parametrize("seed", range(20))
def test_every_instant_is_given_once(seed: int) -> None:
    """Against a count of every whole microsecond of every stream."""
    rng = np.random.default_rng(seed)
    count = 60
    begins = rng.integers(0, 300, count)
    ends = begins + rng.integers(0, 25, count)
    streams = rng.integers(0, rng.integers(1, 4), count)
    names = rng.choice(["a", "b", "c"], count).tolist()
    found = attributed(names, streams.tolist(), begins.astype(np.float64), ends.astype(np.float64), 1)
    busy = np.zeros((3, 400), bool)
    for stream, begin, end in zip(streams, begins, ends):
        busy[stream, begin:end] = True
    window = slice(begins.min(), ends.max())
    kernels = [kernel for kernel in found.kernels if kernel.name != NOTHING]
    assert sum(k.us for k in kernels) == busy.sum()
    assert sum(k.duration_us for k in kernels) == (ends - begins).sum()
    assert sum(k.beside_us for k in kernels) == busy[:, busy.sum(0) > 1].sum()
    assert found.busy_us == busy.any(0).sum()
    assert found.span_us - found.busy_us == (~busy.any(0))[window].sum()


def test_the_table_shows_what_nothing_does_and_what_lies_side_by_side() -> None:
    begins, ends = np.array([0.0, 0.0, 40.0, 10.0]), np.array([20.0, 30.0, 90.0, 60.0])
    profiled = attributed(["a", "b", "c", "copy"], [7, 7, 7, 8], begins, ends, 1)
    lines = kernel_table(profiled, top=2)
    assert lines[2:] == [
        "| 55.6% | 50.0 | 50.0 | 1 | `c` |",
        "| 55.6% | 50.0 | 50.0 | 1 | `copy` |",
        "| 33.3% | 30.0 | 50.0 |  | 2 more |",
        "",
        "80.0 us of these ran beside a kernel of another stream: in all 44.4% over a step.",
    ]
    alone = attributed(["a", "b"], [7, 7], np.array([0.0, 60.0]), np.array([50.0, 100.0]), 1)
    assert kernel_table(alone, top=1)[2:] == [
        "| 50.0% | 50.0 | 50.0 | 1 | `a` |", "| 10.0% | 10.0 | 10.0 | 1 | nothing runs |",
        "| 40.0% | 40.0 | 40.0 |  | 1 more |",
    ]  # fmt: skip
