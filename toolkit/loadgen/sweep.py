"""The sweep: load points one after the other, what is written about them, and what happens when it is interrupted.

Owns the points' states and the result files. It knows neither HTTP (client.py) nor when a request is due (arrival.py).

After every point requests.parquet, sweep.csv and status.json are complete up to it. An interrupted point keeps its
requests, those in flight as ``cancelled``, but gets no row in sweep.csv: its figures would be those of another load.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.config import LoadConfig
from toolkit.loadgen.arrival import ClosedLoop
from toolkit.loadgen.client import Call, Client
from toolkit.loadgen.datasets import Dataset, Sample
from toolkit.loadgen.openai_api import encode_body
from toolkit.loadgen.options import Options
from toolkit.loadgen.progress import Reporter
from toolkit.records import PointStatus, RequestRecord, RunStatus, write_requests, write_status, write_sweep

log = logging.getLogger(__name__)

REPORT_S = 0.25


@dataclass(frozen=True)
class Point:
    """One load point: ``warmup`` requests, then ``measured`` ones, at ``concurrency`` at a time."""

    index: int
    concurrency: int
    warmup: int
    measured: int


def points_of(load: LoadConfig) -> list[Point]:
    return [
        Point(
            index=index,
            concurrency=concurrency,
            warmup=concurrency if load.warmup_requests < 0 else load.warmup_requests,
            measured=load.num_requests or max(load.min_requests, load.requests_per_slot * concurrency),
        )
        for index, concurrency in enumerate(load.concurrency)
    ]


@dataclass
class _Counts:
    """Live figures of the running point, for the progress display only."""

    began: float = field(default_factory=time.perf_counter)
    done: int = 0
    failed: int = 0
    tokens_before: int = 0


class Sweep:
    """One run of the load generator.

    Call ``run`` once; afterwards ``records``, ``rows`` (of sweep.csv) and ``status`` hold everything, in memory as in
    the files. ``take`` is the client's ``on_done``.
    """

    def __init__(self, options: Options, dataset: Dataset) -> None:
        self.options = options
        self.points = points_of(options)
        self.records: list[RequestRecord] = []
        self.rows: list[dict[str, Any]] = []
        self.status = RunStatus(points=[PointStatus(point.concurrency) for point in self.points])
        self._samples: Iterator[Sample] = iter(dataset)
        self._counts = _Counts()
        self._made = 0  # requests made so far: each one's seed differs
        self._run_id = secrets.token_hex(3)  # makes request ids unique among load generators of one server

    def take(self, record: RequestRecord) -> None:
        """Files one ended request."""
        if not self.options.record_text:
            record.output_text = ""
        self.records.append(record)
        self._counts.done += 1
        self._counts.failed += record.status != "ok"

    async def run(self, client: Client, model: str, reporter: Reporter) -> None:
        """Runs every point. Cancelling it is the way to stop early; it then writes what was measured and returns."""
        self._write()
        try:
            for point in self.points:
                await self._run_point(point, client, model, reporter)
        except asyncio.CancelledError:
            self.end("cancelled", "interrupted")
        except Exception as error:
            self.end("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            failed = [point for point in self.status.points if point.state == "failed"]
            reason = f"{len(failed)} of {len(self.points)} load points failed: {failed[0].reason}" if failed else ""
            self.end("failed" if failed else "done", reason)

    def end(self, state: Literal["done", "failed", "cancelled"], reason: str) -> None:
        """Closes the run's status, and that of a point that was running, and writes everything."""
        self.status.state, self.status.reason = state, reason
        for point in self.status.points:
            if point.state == "running":
                point.state, point.reason = state, reason
        self._write()

    async def _run_point(self, point: Point, client: Client, model: str, reporter: Reporter) -> None:
        status = self.status.points[point.index]
        status.state = "running"
        self._write()
        calls = [self._call(point, number, model) for number in range(point.warmup + point.measured)]
        first = len(self.records)
        self._counts = _Counts(tokens_before=client.output_tokens)
        reports = asyncio.create_task(self._report(point, client, reporter))
        try:
            with frozen_heap():
                await ClosedLoop(point.concurrency).run(calls, client.send)
        finally:
            reports.cancel()
        self._finish_point(point, status, self.records[first:])
        reporter.update(self._state(point, client, ended=True))

    def _call(self, point: Point, number: int, model: str) -> Call:
        sample = next(self._samples)
        self._made += 1
        return Call(
            request_id=f"{self._run_id}-{point.index}-{number}",
            prompt_id=sample.id,
            body=encode_body(sample, self.options, model, self.options.seed + self._made - 1),
            point=point.index,
            concurrency=point.concurrency,
            warmup=number < point.warmup,
            expected_output_tokens=self.options.osl if self.options.ignore_eos else 0,
        )

    def _finish_point(self, point: Point, status: PointStatus, records: list[RequestRecord]) -> None:
        measured = [record for record in records if not record.warmup]
        errors = [record.error for record in measured if record.status != "ok"]
        status.state = "failed" if len(errors) == len(measured) else "done"
        if errors:
            status.reason = f"{len(errors)} of {len(measured)} requests failed, the first with: {errors[0]}"
            log.warning("concurrency %d: %s", point.concurrency, status.reason)
        lumped = sum(r.status == "ok" and sum(r.chunk_tokens) != r.output_tokens for r in measured)
        if lumped:
            log.warning(
                "concurrency %d: in %d of %d requests the server counted other than one token a chunk, and does not "
                "count in each chunk: inter-token latency is that of chunks",
                *(point.concurrency, lumped, len(measured)),
            )
        self.rows.append(_sweep_row(records, point.concurrency, self.options.num_gpus))
        self._write()

    def _write(self) -> None:
        if not self.options.out:
            return
        folder = Path(self.options.out)
        if self.records:
            write_requests(folder, self.records)
            write_sweep(folder, self.rows)
        write_status(folder, self.status)

    async def _report(self, point: Point, client: Client, reporter: Reporter) -> None:
        while True:
            reporter.update(self._state(point, client))
            await asyncio.sleep(REPORT_S)

    def _state(self, point: Point, client: Client, ended: bool = False) -> dict[str, Any]:
        counts = self._counts
        elapsed = time.perf_counter() - counts.began
        return {
            "points": len(self.points),
            "point": point.index,
            "concurrency": point.concurrency,
            "phase": "done" if ended else "warm-up" if counts.done < point.warmup else "measure",
            "done": counts.done,
            "total": point.warmup + point.measured,
            "failed": counts.failed,
            "output_tok_s": (client.output_tokens - counts.tokens_before) / max(elapsed, 1e-9),
            "elapsed_s": elapsed,
        }


def _sweep_row(records: list[RequestRecord], concurrency: int, num_gpus: int) -> dict[str, Any]:
    import pandas as pd

    from toolkit.analysis.metrics import sweep_row

    names = RequestRecord.__dataclass_fields__
    frame = pd.DataFrame({name: [getattr(record, name) for record in records] for name in names})
    return sweep_row(frame, concurrency, num_gpus)


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Keeps the garbage collector from walking what exists already while latencies are taken."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
