"""The sweep's books: every load point's state, its row, its file; what an earlier attempt left is carried over.

Owns status.json, sweep.csv and points/ of a sweep, and requests.parquet, which is made of the files when it ends. How
the run ended is the launcher's to say where there is one: status.json stays ``running`` until it does. Runs nothing and
judges nothing (``sweep.py``); what makes two points the same is ``resume.py``'s.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit import point_files
from toolkit.loadgen import resume
from toolkit.loadgen.points import LoadPoint, points_of
from toolkit.point_files import StoredPoint
from toolkit.records.status import PointStatus, RunStatus, write_status
from toolkit.records.sweep import write_sweep

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from toolkit.loadgen.options import Options

log = logging.getLogger(__name__)


class Ledger:
    """All points of a sweep, in order: those of an earlier attempt that are not asked for now, then those asked for.

    Raises:
        ValueError: ``options.out`` holds a sweep that this is not said, or not fit, to go on with.
    """

    def __init__(self, options: Options) -> None:
        self.status = RunStatus()
        self._options = options
        self._folder = Path(options.out) if options.out else None
        self._base = resume.base_settings(options)
        self._stored = {point.status.key: point for point in resume.stored_points(options, self._base)}
        self._rows: dict[int, dict[str, Any]] = {}
        asked = points_of(options)
        keys = [self._key(point) for point in asked]
        if self._stored:
            log.info("resuming %s: %s", options.out, resume.summary(list(self._stored.values()), keys))
        others = [] if options.search else [stored for key, stored in self._stored.items() if key not in keys]
        for stored in others:
            self._keep(stored)
        self._first = len(others)
        for point in asked:
            self.add(point)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of sweep.csv."""
        return [self._rows[place] for place in sorted(self._rows)]

    def place(self, point: LoadPoint) -> int:
        return self._first + point.index

    def of(self, point: LoadPoint) -> PointStatus:
        return self.status.points[self.place(point)]

    def row(self, point: LoadPoint) -> dict[str, Any]:
        return self._rows[self.place(point)]

    def add(self, point: LoadPoint) -> None:
        """Gives ``point`` its place: as it is on the disk where it is done there, else pending."""
        stored = self._stored.get(self._key(point))
        if stored is not None and stored.status.state == "done":
            self._keep(stored)
            return
        self.status.points.append(
            PointStatus(
                point.concurrency,
                request_rate=max(0.0, point.request_rate),
                repeat=point.repeat,
                key=self._key(point),
                attempt=self._options.attempt,
            )
        )

    def file(self, point: LoadPoint, row: dict[str, Any] | None, table: pa.Table, raw: pa.Table | None) -> None:
        """Puts a point that has ended on the disk, its requests before what speaks of them; None: it has no figures."""
        status = self.of(point)
        status.ended = time.time()
        if row is not None:
            row |= {"repeat": status.repeat, "state": status.state, "reason": status.reason}
            self._rows[self.place(point)] = row
        if self._folder is not None and table.num_rows:
            settings = resume.point_settings(self._base, point)
            point_files.write_point(self._folder, status, row, settings, table, raw)
        self.write()

    def write(self) -> None:
        if self._folder is None:
            return
        if self._rows:
            write_sweep(self._folder, self.rows)
        launched = bool(self._options.deployment)  # a sweep that is over is not yet a run that is over
        write_status(self._folder, dataclasses.replace(self.status, state="running") if launched else self.status)

    def close(self, state: Literal["done", "failed", "cancelled"], reason: str) -> None:
        """How the sweep ended, which is also the end of a point that was running; all points' requests in one file."""
        self.status.state, self.status.reason = state, reason
        for point in self.status.points:
            if point.state == "running":
                point.state, point.reason = state, reason
        if self._folder is not None:
            point_files.join(self._folder, [point.key for point in self.status.points])
        self.write()

    def _key(self, point: LoadPoint) -> str:
        return point_files.key_of(resume.point_settings(self._base, point))

    def _keep(self, stored: StoredPoint) -> None:
        if stored.row is not None:
            from toolkit.analysis.sweep_row import counts

            frame = point_files.read_rows(stored)
            self._rows[len(self.status.points)] = stored.row | counts(frame)  # version 1 called the cancelled failed
            stored.status.good_share = good_share(self._options, frame[~frame["warmup"]])  # by the objectives of now
        self.status.points.append(stored.status)


def good_share(options: Options, measured: pd.DataFrame) -> float | None:
    """Share of the ok and failed requests that met the objectives; None where there are none of either."""
    from toolkit.analysis.goodput import Slo, goodput

    slo = Slo(options.slo_ttft_ms, options.slo_itl_ms, options.slo_tpot_ms, options.slo_e2e_ms)
    share = goodput(measured, slo).share if slo else math.nan
    return None if math.isnan(share) else share
