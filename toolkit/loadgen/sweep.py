"""The sweep: load points one after the other, what each comes to, and what happens when it is interrupted.

Owns the order of things and the verdict on a point. It knows neither HTTP (worker.py) nor when a request is due
(arrival.py), and what is on the disk is ledger.py's.

After every point its file in points/, sweep.csv and status.json are complete up to it. An interrupted point keeps its
requests, those in flight as ``interrupted``, but gets no row in sweep.csv: its figures would be those of another load.
A sweep that is resumed runs the points it lacks, with the very requests they would have had.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.loadgen.around import Around
from toolkit.loadgen.ledger import Ledger, good_share
from toolkit.loadgen.options import Options
from toolkit.loadgen.points import CallMaker, LoadPoint, Search, points_of
from toolkit.loadgen.pool import CallsFile, Pool, Result, WorkerError, owner
from toolkit.loadgen.progress import Reporter
from toolkit.loadgen.proof import VERDICTS, judge
from toolkit.loadgen.server import ServerGone, ServerWatch
from toolkit.loadgen.validity import Limits, why_invalid
from toolkit.loadgen.wire import Progress
from toolkit.records.requests import NOT_FAILED
from toolkit.records.status import ClientProof, PointStatus, RunStatus

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

REPORT_S = 0.25


@dataclass
class _Live:
    """Figures of the running point, for the progress display only."""

    total: int
    began: float = field(default_factory=time.perf_counter)
    last: Progress = field(default_factory=lambda: Progress(0, 0, 0, 0))


class Sweep:
    """One run of the load generator.

    Call ``run`` once; afterwards ``rows`` (of sweep.csv) and ``status`` hold everything, in memory as in the files.

    Attributes:
        gone: it ended because the server was no longer there.
    """

    def __init__(self, options: Options, ledger: Ledger) -> None:
        self.options = options
        self.ledger = ledger
        self.gone = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.ledger.rows

    @property
    def status(self) -> RunStatus:
        return self.ledger.status

    @property
    def trustworthy(self) -> bool:
        """No load point's figures are partly the client's own."""
        return all(point.client is None or point.client.verdict == "ok" for point in self.status.points)

    async def run(
        self, pool: Pool, maker: CallMaker, transport: str, around: Around, server: ServerWatch, reporter: Reporter
    ) -> None:
        """Runs every point. Cancelling it is the way to stop early; it then writes what was measured and returns."""
        self._pool, self._maker, self._transport, self._around = pool, maker, transport, around
        self._server, self._server_started = server, await server.started()
        self.ledger.write()
        try:
            for point in self._points():
                if self.ledger.of(point).state == "done":
                    maker.skip(point)
                else:
                    await self._run_point(point, reporter)
        except asyncio.CancelledError:
            self.ledger.close("cancelled", "interrupted")
        except ServerGone as error:
            self.gone = True
            log.error("%s", error)
            self.ledger.close("failed", str(error))
        except (WorkerError, ValueError) as error:
            log.error("%s", error)
            self.ledger.close("failed", str(error))
        except Exception as error:
            self.ledger.close("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            reason = _bad_points(self.status.points)
            self.ledger.close("failed" if reason else "done", reason)

    def _points(self) -> Iterator[LoadPoint]:
        """The points, one at a time: where a search decides, the next one depends on how the last one went."""
        yield from points_of(self.options)
        if not self.options.search:
            return
        search = Search(self.options)
        while (point := search.next()) is not None:
            self.ledger.add(point)
            yield point
            status = self.ledger.of(point)
            share = status.good_share or 0.0
            search.tell(status.state == "done" and share >= self.options.slo_share)
        kind = "requests/s" if self.options.request_rate else "concurrency"
        if search.best:
            log.info("the largest load that meets the objectives: %s %g", kind, search.best)
        else:
            log.warning("no load meets the objectives, the smallest one included")

    async def _run_point(self, point: LoadPoint, reporter: Reporter) -> None:
        """Raises ``CancelledError`` when it was interrupted, ``ServerGone`` when the server is no longer there."""
        status = self.ledger.of(point)
        status.state = "running"
        self.ledger.write()
        files = await self._make_calls(point)
        live = _Live(sum(map(len, files)))
        await self._around.before_point(point.concurrency)

        def progress(last: Progress) -> None:
            live.last = last
            reporter.update(self._state(point, live))

        progress(live.last)
        running = asyncio.create_task(self._pool.run(point.load(self.options), files, progress, REPORT_S))
        gone, interrupted = await self._until_over(running, lambda: live.last.failed)
        result = running.result()
        await self._around.after_point()
        if not gone and not interrupted and _any_failed(result.table):
            gone = await self._server.gone()  # before a dead server's refusals are taken for what the server does
        if gone or interrupted:
            status.state, status.reason = "cancelled", f"the server is gone: {gone}" if gone else "interrupted"
            self.ledger.file(point, None, result.table, result.raw)
            raise ServerGone(status.reason) if gone else asyncio.CancelledError
        await self._finish_point(point, status, result)
        reporter.update(self._state(point, live, ended=True))

    async def _make_calls(self, point: LoadPoint) -> list[CallsFile]:
        load = point.load(self.options)
        files = self._pool.files(load)
        for number, conversation in enumerate(self._maker.conversations(point)):
            for call, body in conversation:
                files[owner(number, load, len(files))].add(call, body)
            if number % 100 == 0:
                await asyncio.sleep(0)  # a large point takes seconds to make: signals and /metrics go on meanwhile
        return files

    async def _until_over(self, running: asyncio.Task[Result], failed: Callable[[], int]) -> tuple[str, bool]:
        """Waits for the point's end, ending it when the server is gone: (how that shows, whether it was interrupted).

        The server is asked only when requests have failed since it was asked last.
        """
        gone, interrupted, seen = "", False, 0
        while not running.done():
            try:
                await asyncio.wait([running], timeout=REPORT_S)
                if not running.done() and not gone and failed() > seen:
                    seen = failed()
                    gone = await self._server.gone()
                    if gone:
                        running.cancel()
            except asyncio.CancelledError:
                interrupted = True
                running.cancel()
        return gone, interrupted

    async def _finish_point(self, point: LoadPoint, status: PointStatus, result: Result) -> None:
        table, frame = result.table, result.table.to_pandas()
        measured = frame[~frame["warmup"].astype(bool)]
        errors = measured["error"][~measured["status"].isin(NOT_FAILED)]
        proof = status.client = judge(result.evidence, self._transport, len(result.evidence))
        problems = why_invalid(measured, proof, await self._restarted(), Limits.of(self.options))
        first = f"the first with: {errors.iloc[0]}" if len(errors) else ""
        if first:
            status.reason = f"{len(errors)} of {len(measured)} requests failed, {first}"
        if first and not (measured["status"] == "ok").any():
            status.state = "failed"
        elif problems:
            status.state, status.reason = "invalid", "; ".join([*problems, *([first] if first else [])])
        else:
            status.state = "done"
        if status.reason:
            log.warning("%s: %s: %s", point.name, status.state, status.reason)
        _warn(point, status, proof, len(measured))
        status.good_share = good_share(self.options, measured)
        if point.open_loop:
            table, status.concurrency = _with_concurrency(table, frame)
        row = _sweep_row(frame, status.concurrency, self.options.num_gpus, max(0.0, point.request_rate))
        self.ledger.file(point, row, table, result.raw)

    async def _restarted(self) -> bool:
        before, self._server_started = self._server_started, await self._server.started()
        return None not in (before, self._server_started) and self._server_started != before

    def _state(self, point: LoadPoint, live: _Live, ended: bool = False) -> dict[str, Any]:
        elapsed, done = time.perf_counter() - live.began, live.last
        row = self.ledger.row(point) if ended else {}
        phase = "warm-up" if done.done < point.warmup else "read" if done.parsing else "measure"
        return {
            "points": len(self.status.points),
            "point": self.ledger.place(point),
            "concurrency": self.ledger.of(point).concurrency,
            "request_rate": point.request_rate,
            "phase": "done" if ended else phase,
            "done": live.total if ended else done.done,
            "total": live.total,
            "failed": done.failed,
            "cancelled": done.cancelled,
            "output_tok_s": row.get("output_tok_s", done.reads / max(elapsed, 1e-9)),
            "latencies": _medians(row),
            "elapsed_s": elapsed,
        }


def _medians(row: dict[str, Any]) -> dict[str, float]:
    """TTFT and TPOT of a point that has ended, ms, as far as they exist."""
    found = {name: row.get(f"{name}_p50_ms", math.nan) for name in ("ttft", "tpot")}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _bad_points(points: list[PointStatus]) -> str:
    """``1 of 4 load points failed: ...; 1 is invalid: ...``; empty where none did."""
    parts = []
    for state, verb in (("failed", "failed"), ("invalid", "did not pass as valid")):
        bad = [point for point in points if point.state == state]
        if bad:
            parts.append(f"{len(bad)} of {len(points)} load points {verb}: {bad[0].reason}")
    return "; ".join(parts)


def _any_failed(table: pa.Table) -> bool:
    return any(status not in NOT_FAILED for status in table["status"].unique().to_pylist())


def _warn(point: LoadPoint, status: PointStatus, proof: ClientProof, requests: int) -> None:
    if proof.verdict != "ok" and VERDICTS[proof.verdict] not in status.reason:  # else it has been said
        log.warning("%s: %s: %s", point.name, VERDICTS[proof.verdict], "; ".join(proof.reasons))
    if proof.token_count_mismatches:
        log.warning(
            "%s: in %d of %d requests the server counted other than one token a chunk, and does not count in each "
            "chunk: inter-token latency is that of chunks",
            *(point.name, proof.token_count_mismatches, requests),
        )
    if proof.length_mismatches:
        log.warning("%s: %d answers are not as long as asked", point.name, proof.length_mismatches)


def _with_concurrency(table: pa.Table, frame: pd.DataFrame) -> tuple[pa.Table, int]:
    """An open loop's rows with the mean number of requests that were in flight as their ``concurrency``."""
    import numpy as np
    import pyarrow as pa

    end_s = frame["end_s"].fillna(0.0)
    window = float((frame["t_send"] + end_s).max() - frame["t_send"].min())
    mean = max(1, round(float(end_s.sum()) / max(window, 1e-9)))
    frame["concurrency"] = mean
    column = pa.array(np.full(len(frame), mean, np.int64))
    return table.set_column(table.schema.get_field_index("concurrency"), "concurrency", column), mean


def _sweep_row(frame: pd.DataFrame, concurrency: int, num_gpus: int, request_rate: float) -> dict[str, Any]:
    from toolkit.analysis.sweep_row import sweep_row

    return sweep_row(frame, concurrency, num_gpus, request_rate=request_rate)
