"""The sweep: load points one after the other, what is written about them, and what happens when it is interrupted.

Owns the points' states and the result files. It knows neither HTTP (worker.py) nor when a request is due (arrival.py).

After every point requests.parquet, sweep.csv and status.json are complete up to it. An interrupted point keeps its
requests, those in flight as ``cancelled``, but gets no row in sweep.csv: its figures would be those of another load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.loadgen.around import Around
from toolkit.loadgen.options import Options
from toolkit.loadgen.points import CallMaker, LoadPoint, Search, points_of
from toolkit.loadgen.pool import Pool, WorkerError, owner
from toolkit.loadgen.progress import Reporter
from toolkit.loadgen.proof import Evidence, judge
from toolkit.loadgen.wire import Progress
from toolkit.records import PointStatus, RunStatus, write_raw, write_requests, write_status, write_sweep

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
    last: Progress = field(default_factory=lambda: Progress(0, 0, 0))


class Sweep:
    """One run of the load generator.

    Call ``run`` once; afterwards ``rows`` (of sweep.csv), ``table`` (of requests.parquet) and ``status`` hold
    everything, in memory as in the files.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.tables: list[pa.Table] = []
        self.raw: list[pa.Table] = []
        self.status = RunStatus(points=[_pending(point) for point in points_of(options)])

    @property
    def trustworthy(self) -> bool:
        """No load point's figures are partly the client's own."""
        return all(point.client is None or point.client.verdict == "ok" for point in self.status.points)

    async def run(self, pool: Pool, maker: CallMaker, transport: str, around: Around, reporter: Reporter) -> None:
        """Runs every point. Cancelling it is the way to stop early; it then writes what was measured and returns."""
        self._pool, self._maker, self._transport, self._around = pool, maker, transport, around
        self._write()
        try:
            for point in self._points():
                await self._run_point(point, reporter)
        except asyncio.CancelledError:
            self.end("cancelled", "interrupted")
        except (WorkerError, ValueError) as error:
            log.error("%s", error)
            self.end("failed", str(error))
        except Exception as error:
            self.end("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            points = self.status.points
            failed = [point for point in points if point.state == "failed"]
            reason = f"{len(failed)} of {len(points)} load points failed: {failed[0].reason}" if failed else ""
            self.end("failed" if failed else "done", reason)

    def _points(self) -> Iterator[LoadPoint]:
        """The points, one at a time: where a search decides, the next one depends on how the last one went."""
        yield from points_of(self.options)
        if not self.options.search:
            return
        search = Search(self.options)
        while (point := search.next()) is not None:
            self.status.points.append(_pending(point))
            yield point
            share = self.status.points[-1].good_share
            search.tell(share is not None and share >= self.options.slo_share)
        kind = "requests/s" if self.options.request_rate else "concurrency"
        if search.best:
            log.info("the largest load that meets the objectives: %s %g", kind, search.best)
        else:
            log.warning("no load meets the objectives, the smallest one included")

    def end(self, state: Literal["done", "failed", "cancelled"], reason: str) -> None:
        """Closes the run's status, and that of a point that was running, and writes everything."""
        self.status.state, self.status.reason = state, reason
        for point in self.status.points:
            if point.state == "running":
                point.state, point.reason = state, reason
        self._write()

    async def _run_point(self, point: LoadPoint, reporter: Reporter) -> None:
        """Raises ``CancelledError`` when it was interrupted."""
        status = self.status.points[point.index]
        status.state = "running"
        self._write()
        load = point.load(self.options)
        files = self._pool.files(load)
        made = 0
        for number, conversation in enumerate(self._maker.conversations(point)):
            for call, body in conversation:
                files[owner(number, load, len(files))].add(call, body)
            made += len(conversation)
            if number % 100 == 0:
                await asyncio.sleep(0)  # a large point takes seconds to make: signals and /metrics go on meanwhile
        live = _Live(made)
        await self._around.before_point()

        def progress(last: Progress) -> None:
            live.last = last
            reporter.update(self._state(point, live))

        progress(live.last)
        result = await self._pool.run(load, files, progress, REPORT_S)
        await self._around.after_point()
        self.tables.append(result.table)
        if result.raw is not None:
            self.raw.append(result.raw)
        if result.interrupted:
            raise asyncio.CancelledError
        self._finish_point(point, status, result.table, result.evidence)
        reporter.update(self._state(point, live, ended=True))

    def _finish_point(self, point: LoadPoint, status: PointStatus, table: pa.Table, evidence: list[Evidence]) -> None:
        frame: pd.DataFrame = table.to_pandas()
        measured = frame[~frame["warmup"].astype(bool)]
        errors = measured["error"][~measured["status"].isin(["ok", "cancelled"])]  # cancelled: cancel_fraction asked
        status.state = "failed" if len(errors) and not (measured["status"] == "ok").any() else "done"
        if len(errors):
            status.reason = f"{len(errors)} of {len(measured)} requests failed, the first with: {errors.iloc[0]}"
            log.warning("%s: %s", point.name, status.reason)
        status.good_share = self._good_share(measured)
        proof = status.client = judge(evidence, self._transport, len(evidence))
        if proof.verdict != "ok":
            log.warning("%s: the client's own part is %s: %s", point.name, proof.verdict, "; ".join(proof.reasons))
        if proof.token_count_mismatches:
            log.warning(
                "%s: in %d of %d requests the server counted other than one token a chunk, and does not count in each "
                "chunk: inter-token latency is that of chunks",
                *(point.name, proof.token_count_mismatches, len(measured)),
            )
        if proof.length_mismatches:
            log.warning("%s: %d answers are not as long as asked", point.name, proof.length_mismatches)
        if point.open_loop:
            self.tables[-1], status.concurrency = _with_concurrency(table, frame)
        self.rows.append(_sweep_row(frame, status.concurrency, self.options.num_gpus, max(0.0, point.request_rate)))
        self._write()

    def _good_share(self, measured: pd.DataFrame) -> float | None:
        from toolkit.analysis.metrics import Slo, goodput

        options = self.options
        slo = Slo(options.slo_ttft_ms, options.slo_itl_ms, options.slo_tpot_ms, options.slo_e2e_ms)
        return goodput(measured, slo).share if slo and len(measured) else None

    def _write(self) -> None:
        if not self.options.out:
            return
        folder = Path(self.options.out)
        if any(table.num_rows for table in self.tables):
            import pyarrow as pa

            write_requests(folder, pa.concat_tables(self.tables))
            write_sweep(folder, self.rows)
            if self.raw:
                write_raw(folder, pa.concat_tables(self.raw))
        write_status(folder, self.status)

    def _state(self, point: LoadPoint, live: _Live, ended: bool = False) -> dict[str, Any]:
        elapsed, done = time.perf_counter() - live.began, live.last
        phase = "warm-up" if done.done < point.warmup else "read" if done.parsing else "measure"
        return {
            "points": len(self.status.points),
            "point": point.index,
            "concurrency": self.status.points[point.index].concurrency,
            "request_rate": point.request_rate,
            "phase": "done" if ended else phase,
            "done": live.total if ended else done.done,
            "total": live.total,
            "failed": done.failed,
            "output_tok_s": self.rows[-1]["output_tok_s"] if ended else done.reads / max(elapsed, 1e-9),
            "elapsed_s": elapsed,
        }


def _pending(point: LoadPoint) -> PointStatus:
    return PointStatus(point.concurrency, request_rate=max(0.0, point.request_rate))


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
    from toolkit.analysis.metrics import sweep_row

    return sweep_row(frame, concurrency, num_gpus, request_rate=request_rate)
