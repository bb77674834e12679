"""What each rebalance of experts did: the balance planned, the balance that came of it, and what it cost.

Planned figures are the engine's (``rebalances.jsonl``); measured ones are of the recorder's windows between two
rebalances (``experts.npz``). Read next: ``charts/rebalances.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.analysis.imbalance import balancedness, summed
from toolkit.analysis.load import Run
from toolkit.records.experts import RebalanceRecord

MB = 1e6


@dataclass(frozen=True)
class Stretch:
    """The time between two rebalances, Unix seconds.

    Attributes:
        balancedness: of all rows that ranks received in it, mean over layers: the lasting skew, which is what a plan
            can be compared with. NaN without any.
        by_window: the mean of its windows, which are also uneven by chance: what the passes waited for.
    """

    begin: float
    end: float
    balancedness: float
    by_window: float


@dataclass(frozen=True)
class Outcome:
    """One rebalance, with what was measured before it and after it."""

    record: RebalanceRecord
    before: Stretch
    after: Stretch


def outcomes(run: Run) -> list[Outcome]:
    """Every rebalance of the run, in order."""
    found = stretches(run)
    return [Outcome(record, found[i], found[i + 1]) for i, record in enumerate(run.rebalances)]


def stretches(run: Run) -> list[Stretch]:
    """The stretches before, between and after the rebalances; windows that overlap one are in neither."""
    lines, windows = run.rebalances, run.windows
    first, last = (
        (windows.times_W2[0, 0], windows.times_W2[-1, 1]) if windows and len(windows.times_W2) else (np.nan,) * 2
    )
    begins = [float(first), *(line.t_end for line in lines)]
    ends = [*(line.t_begin for line in lines), float(last)]
    return [_stretch(run, begin, end) for begin, end in zip(begins, ends)]


def _stretch(run: Run, begin: float, end: float) -> Stretch:
    """From the windows that lie within."""
    windows, nan = run.windows, float("nan")
    if windows is None:
        return Stretch(begin, end, nan, nan)
    inside = summed(windows.where((windows.times_W2[:, 0] >= begin) & (windows.times_W2[:, 1] <= end)))
    lasting = balancedness(inside.gpu_loads_LG) if inside.windows else np.empty(0)
    known = lasting[np.isfinite(lasting)]
    return Stretch(begin, end, float(known.mean()) if len(known) else nan, inside.balancedness_mean)


def table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Titles and rows for the report."""
    titles = ["#", "at, s", "why", "state", "planned balance", "bound", "measured balance", "slots moved", "layers",
              "MB in nodes", "MB between", "chunks", "longest pause, ms", "pauses, ms", "transfers, ms"]  # fmt: skip
    start = min((o.before.begin for o in outcomes(run)), default=0.0)
    return titles, [_row(outcome, start) for outcome in outcomes(run)]


def _row(outcome: Outcome, start: float) -> list[str]:
    line = outcome.record
    return [
        f"{line.number}", f"{line.t_begin - start:.1f}", line.trigger, line.state,
        f"{_figure(line.balancedness_before)} → {_figure(line.balancedness_after)}", _figure(line.balancedness_bound),
        f"{_figure(outcome.before.balancedness)} → {_figure(outcome.after.balancedness)}", f"{line.moved_slots}",
        f"{line.layers}", f"{line.same_node_bytes / MB:.1f}", f"{line.cross_node_bytes / MB:.1f}", f"{line.chunks}",
        f"{max(line.pauses_ms, default=0.0):.2f}", f"{sum(line.pauses_ms):.1f}", f"{sum(line.transfers_ms):.0f}",
    ]  # fmt: skip


def sentences(run: Run) -> list[str]:
    """The rebalances of the run in words; none: nothing is said."""
    found = outcomes(run)
    if not found:
        return []
    moved = sum(o.record.moved_slots for o in found)
    size = sum(o.record.same_node_bytes + o.record.cross_node_bytes for o in found) / MB
    pauses = [pause for o in found for pause in o.record.pauses_ms]
    first, last = found[0].before.balancedness, found[-1].after.balancedness
    balance = (
        f"Experts were rebalanced {len(found)} times: measured balancedness {_figure(first)} before the first, "
        f"{_figure(last)} after the last."
    )
    cost = (
        f"{moved} slots were given another rank's expert, {size:.1f} MB in all; steps waited {sum(pauses):.1f} ms for "
        f"it in total, {max(pauses, default=0.0):.2f} ms at a time at most."
    )
    aborted = [o.record for o in found if o.record.state == "aborted"]
    return [balance, cost] + [f"Rebalance {line.number} was given up: {line.reason}." for line in aborted]


def _figure(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.3f}"
