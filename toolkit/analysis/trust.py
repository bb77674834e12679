"""When not to trust a load point: the rules behind the report's warnings.

Owns the checks and their thresholds; each warning carries the figures it rests on and, where there is one, the way out.
Read next: findings.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from toolkit import records
from toolkit.analysis.chunks import chunks_of
from toolkit.analysis.load import Run
from toolkit.analysis.metrics import failed, succeeded, ttft_s
from toolkit.analysis.nodes import throttled
from toolkit.analysis.steady import ended, held_concurrency, in_flight, steady_interval, tok_s_between
from toolkit.analysis.sweep_table import LoadPoint

ENOUGH_FOR_P99 = 100  # requests: with fewer, linear p99 lies between the two slowest
HELD = 0.9  # share of the asked concurrency below which the client, not the server, set the load
DRIFT = 0.2  # change of throughput between the halves of the steady state
CLOCK_S = 0.005  # what clocks of one host may disagree by


def warnings(run: Run) -> list[str]:
    """What a reader must know before trusting the figures."""
    run.read_all()
    found = list(run.warnings)
    if run.missing:
        found.append(f"missing: {', '.join(run.missing)}")
    for point in run.points:
        if not point.valid:
            found.append(f"concurrency {point.concurrency} is invalid and left out: {point.row['reason']}")
        found += [f"concurrency {point.concurrency}: {text}" for text in _point(point)]
    found += _attempts(run)
    found += [
        f"{name}: its clock was held down by heat or a power brake in {share:.0%} of the samples"
        for name, share in throttled(run.nodes).items()
    ]
    few = [
        f"{point.concurrency} ({ok})"
        for point in run.points
        if 0 < (ok := int(point.row["requests"] - point.row["failed"] - point.row["cancelled"])) < ENOUGH_FOR_P99
    ]
    if few:
        found.append(
            f"too few requests for p99 (under {ENOUGH_FOR_P99}: it is close to the slowest one) at concurrency "
            f"{', '.join(few)}; raise load.min_requests or load.requests_per_slot"
        )
    found += [
        f"the load generator itself is {point.client.verdict} at concurrency {point.concurrency}: {reason}"
        for point in (run.status.points if run.status is not None else ())
        if point.client is not None
        for reason in point.client.reasons
    ]
    if run.experts is not None and any(load is None for load in run.point_loads):
        unseen = [str(p.concurrency) for p, load in zip(run.points, run.point_loads, strict=True) if load is None]
        found.append(f"no recorder window overlaps the measured requests of concurrency {', '.join(unseen)}")
    return found + _clocks(run)


def _attempts(run: Run) -> Iterator[str]:
    """What differed between the attempts at a run that was resumed."""
    entries = run.manifest.get("attempts")
    for entry in entries if isinstance(entries, list) else []:
        changed = entry.get("changed") if isinstance(entry, dict) else None
        if isinstance(changed, dict) and changed:
            what = "; ".join(f"{name}: {pair[0]} -> {pair[1]}" for name, pair in list(changed.items())[:6])
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            yield f"attempt {entry.get('attempt')} was not made on the same as the one before: {what}{more}"


def _point(point: LoadPoint) -> Iterator[str]:
    ok, bad = succeeded(point.requests), failed(point.requests)
    if count := int(point.row["failed"]):
        kinds = ", ".join(f"{number} {kind}" for kind, number in bad["status"].value_counts().items())
        common = f" ({kinds}); most often: {bad['error'].mode().iloc[0]}" if len(bad) else ""
        yield f"{count} of {int(point.row['requests'])} requests failed{common}"
    if not len(ok):
        return
    asked = ok[ok["expected_output_tokens"] > 0]
    off = asked[asked["output_tokens"] != asked["expected_output_tokens"]]
    if len(off):
        yield (
            f"{len(off)} of {len(asked)} answers are not as long as asked (mean {off['output_tokens'].mean():.2f} of "
            f"{off['expected_output_tokens'].mean():.2f} tokens)"
        )
    chunks = chunks_of(ok)
    carried = np.bincount(chunks.owner, weights=chunks.tokens, minlength=len(ok))
    uncounted = int((ok["output_tokens"].to_numpy(np.float64) != carried).sum())
    if uncounted:
        yield f"{uncounted} answers whose chunks do not add up to their usage; ITL is rough"
    yield from _steadiness(point)
    yield from _client(point)


def _steadiness(point: LoadPoint) -> Iterator[str]:
    begin, end = steady_interval(point.requests, point.concurrency)
    if np.isnan(begin):
        yield (
            "no steady state (shorter than a typical request, or the concurrency was never reached): throughput holds "
            "ramp-up and tail; raise load.requests_per_slot"
        )
        return
    middle = (begin + end) / 2
    first, second = (tok_s_between(point.requests, *half) for half in ((begin, middle), (middle, end)))
    waves = (end - begin) / float(np.median(ended(point.requests) - point.requests["t_send"].to_numpy(np.float64)))
    if waves >= 4 and abs(second - first) > DRIFT * max(first, second):
        yield f"throughput drifts in the steady state: {first:.3g} tok/s in its first half, {second:.3g} in its second"


def _client(point: LoadPoint) -> Iterator[str]:
    """Signs that the load generator was the limit."""
    begin, end = steady_interval(point.requests, point.concurrency)
    held = held_concurrency(point.requests, begin, end)
    if held < HELD * point.concurrency and not point.row.get("request_rate", 0) > 0:
        yield f"the client held {held:.3g} of {point.concurrency} requests in flight: it, not the server, set the load"
    ok = succeeded(point.requests)
    late, ttft = -ok["scheduled_s"].to_numpy(np.float64), ttft_s(ok)
    late, ttft = late[np.isfinite(late)], ttft[np.isfinite(ttft)]
    if len(late) and len(ttft):
        lag = float(np.percentile(late, 99))
        if lag > max(0.02, 0.1 * float(np.median(ttft))):
            yield (
                f"requests were sent late (p99 {lag * 1e3:.3g} ms after their time): TTFT from the send hides this "
                "wait; the client is saturated, or the concurrency cap held them back"
            )


def _clocks(run: Run) -> list[str]:
    """Clocks that went backwards: wall-clock stamps that contradict durations on the monotonic clock."""
    found = []
    for point in run.points:
        if point.requests.empty or point.concurrency < 1 or point.row.get("request_rate", 0) > 0:
            continue  # an open loop may have any number in flight
        shorter = point.requests.assign(end_s=ended(point.requests) - point.requests["t_send"] - CLOCK_S)
        over = int(in_flight(shorter)[1].max(initial=0))
        if over > point.concurrency:
            found.append(
                f"concurrency {point.concurrency}: {over} requests seem to be in flight at once: the client's clock "
                "was set back during it"
            )
    steps = run.steps
    for rank, rows in steps.sort_values("step").groupby("dp_rank"):
        begin, duration = rows["t_begin"].to_numpy(np.float64), rows["duration_s"].to_numpy(np.float64)
        back = int((np.diff(begin) < duration[:-1] - CLOCK_S).sum())
        if back:
            found.append(f"the clock of DP rank {rank} was set back {back} times; its steps may be in wrong moments")
    if run.windows is not None and (np.diff(run.windows.times_W2[:, 0]) < 0).any():
        found.append(f"windows of {records.EXPERTS} go back in time: the clock of rank 0 was set back")
    return found
