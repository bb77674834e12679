"""``Run``: a run folder, opened for reading; each part is read when it is first asked for.

Owns what happens when a part is missing or broken: the part is empty, ``missing`` or ``warnings`` says so, and the
rest stays usable.
Knows the file names and schemas through records/. Nothing is unpickled or evaluated.
Read next: charts.py, findings.py, report.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import yaml

from toolkit import heartbeat, point_files, records
from toolkit.analysis import attempts, settings
from toolkit.analysis.chunks import check_chunks
from toolkit.analysis.goodput import Slo
from toolkit.analysis.imbalance import PointLoad, WindowLoads, summed, window_loads
from toolkit.analysis.metrics import interval
from toolkit.analysis.sweep_table import LoadPoint, load_points, missing_rows, read_whole, recounted
from toolkit.records.experts import ExpertCounts, RebalanceRecord, read_rebalances
from toolkit.records.requests import read_requests, requests_schema
from toolkit.records.samples import MetricSample, NodeSample
from toolkit.records.status import RunStatus, read_status
from toolkit.records.steps import StepRecord, TransferRecord, read_transfers
from toolkit.records.sweep import SWEEP_COLUMNS
from toolkit.records.tables import schema_of

if TYPE_CHECKING:
    from toolkit.analysis.join import Loss

T = TypeVar("T")


class Run:
    """A run folder.

    Args:
        path: the folder, or a link to it (``results/<exp>/latest``).

    Raises:
        ValueError: ``path`` is not a folder, or holds nothing of a run.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        self.warnings: list[str] = []
        self.missing: list[str] = []
        parts = (records.STATUS, records.REQUESTS, records.SWEEP, records.CONFIG)
        if not any((self.path / part).exists() for part in parts):
            raise ValueError(
                f"run={path} is not a run folder: it holds none of {', '.join(parts)}; "
                "give results/<exp>/latest or results/<exp>/<time>"
            )

    @property
    def name(self) -> str:
        """``<exp>/<time>``."""
        return f"{self.path.parent.name}/{self.path.name}"

    @cached_property
    def status(self) -> RunStatus | None:
        return self._read(records.STATUS, lambda: read_status(self.path), None)

    @property
    def state(self) -> str:
        """``dead`` in place of ``running`` for a run whose launcher gives no sign of life; empty: not known."""
        return heartbeat.run_state(self.path, self.status) if self.status else ""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self._read(records.MANIFEST, lambda: self._mapping(records.MANIFEST), {})

    @cached_property
    def plan(self) -> dict[str, Any]:
        return self._read(records.PLAN, lambda: self._mapping(records.PLAN), {})

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read(records.CONFIG, lambda: self._mapping(records.CONFIG), {})

    @cached_property
    def overrides(self) -> list[str]:
        """What the user changed on the command line."""

        def read() -> list[str]:
            value = yaml.safe_load((self.path / records.OVERRIDES).read_text(encoding="utf-8")) or []
            if not isinstance(value, list):
                raise ValueError(f"a list is expected, not {type(value).__name__}")
            return [str(item) for item in value]

        return self._read(records.OVERRIDES, read, [])

    @cached_property
    def requests(self) -> pd.DataFrame:
        """``requests.parquet`` without the texts; no rows when it is missing, broken or lacks a column.

        List columns are Arrow's: ``requests.chunk_s.list.flatten()``, or ``metrics.itl_s(requests)``.
        """
        columns = [name for name in requests_schema().names if name != "output_text"]

        def read() -> pd.DataFrame:
            self._join_points()
            requests = read_requests(self.path, columns)
            check_chunks(requests)
            if not requests["point"].is_monotonic_increasing:
                requests = requests.sort_values("point", kind="stable", ignore_index=True)
            return requests

        files = point_files.FOLDER if (self.path / point_files.FOLDER).is_dir() else records.REQUESTS
        return self._read(files, read, _no_rows(columns))

    def _join_points(self) -> None:
        """A run that goes on, or was killed, has points whose rows are not in requests.parquet yet."""
        if point_files.newer_than_joined(self.path):
            point_files.rejoin(self.path, [point.key for point in self.status.points] if self.status else [])

    @cached_property
    def texts(self) -> pd.DataFrame:
        """``request_id``, ``prompt_id`` and ``output_text`` of every request, read only when asked for."""
        columns = ["request_id", "prompt_id", "output_text"]
        return self._read(records.REQUESTS, lambda: read_requests(self.path, columns), _no_rows(columns))

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a forward pass of a DP rank (``records.steps.StepRecord``), in the order of time."""
        columns = list(StepRecord._fields)
        return self._read(records.STEPS, lambda: attempts.steps(self.path), _no_rows(columns))

    @cached_property
    def server_metrics(self) -> pd.DataFrame:
        """Samples of the servers' ``/metrics`` (``records.samples.MetricSample``); no rows when none were taken."""
        return self._optional(records.SERVER_METRICS, MetricSample)

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """Samples of nodes and GPUs (``records.samples.NodeSample``); no rows when none were taken."""
        none = _no_rows(list(NodeSample._fields))
        name = records.NODES if attempts.present(self.path, records.NODES) else records.NODE_SAMPLES
        if not attempts.present(self.path, name):
            return none  # as for most runs of other tools: no warning
        return self._read(name, lambda: attempts.nodes(self.path), none)

    @cached_property
    def transfers(self) -> pd.DataFrame:
        """Requests handed from prefill to decode (``steps.TransferRecord``); no rows where serving is aggregated."""
        columns = list(TransferRecord._fields)
        if not (self.path / records.TRANSFERS).exists():
            return _no_rows(columns)
        return self._read(records.TRANSFERS, lambda: read_transfers(self.path), _no_rows(columns))

    @cached_property
    def slo(self) -> Slo:
        """The config's ``load.slo_*_ms``; all 0 where none is set."""
        slo, wrong = settings.objectives(self.config)
        self.warnings += [f"{records.CONFIG}: {name} is no time; left out" for name in wrong]
        return slo

    @property
    def mapping(self) -> str:
        """``DEP=16`` and its like; empty where neither plan nor config says."""
        return settings.mapping(self.plan, self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """The config with dotted keys (``engine.page_size``), and ``run``, ``model``, ``mapping``, ``num_gpus``."""
        flat = dict(settings.dotted(self.config))
        own = {"run": self.name, "model": flat.get("model.name", ""), "mapping": self.mapping}
        return own | {"num_gpus": self.num_gpus} | flat

    @cached_property
    def sweep(self) -> pd.DataFrame:
        """``sweep.csv``, with rows computed from the requests for the load points that it lacks."""

        def read() -> pd.DataFrame:
            table, lacking = read_whole(self.path)
            if lacking:
                self.warnings.append(f"{records.SWEEP} is of another version: it has no {', '.join(lacking)}")
            return recounted(table, self.requests) if "cancelled" in lacking else table

        table = self._read(records.SWEEP, read, _no_rows(list(SWEEP_COLUMNS)))
        added = missing_rows(table, self.requests, self.num_gpus, self.status.points if self.status else [])
        if added.empty:
            return table
        self.warnings.append(f"{records.SWEEP} lacks {len(added)} load point(s): computed from {records.REQUESTS}")
        return pd.concat([table, added], ignore_index=True) if len(table) else added

    @cached_property
    def points(self) -> list[LoadPoint]:
        """The load points, in the order of ``sweep``."""
        return load_points(self.requests, self.sweep)

    @cached_property
    def experts(self) -> ExpertCounts | None:
        def read() -> ExpertCounts:
            experts = attempts.experts(self.path)
            window_loads(experts)  # refuses arrays that do not fit together
            return experts

        return self._read(records.EXPERTS, read, None)

    @cached_property
    def windows(self) -> WindowLoads | None:
        """GPU loads of every recorder window, or None where no expert counts were left."""
        return window_loads(self.experts) if self.experts is not None else None

    @cached_property
    def rebalances(self) -> list[RebalanceRecord]:
        """Rebalances of experts, in order; none where ``engine.enable_eplb`` was off."""
        if not (self.path / records.REBALANCES).exists():
            return []
        return self._read(records.REBALANCES, lambda: read_rebalances(self.path), [])

    @cached_property
    def baseline(self) -> Run | None:
        """The run that the config asks to compare this one with (``compare_with``); None: none, or it is not there."""
        named = self.config.get("compare_with")
        if not isinstance(named, str) or not named:
            return None
        try:
            found = Run(named)
        except ValueError as error:
            self.warnings.append(f"compare_with: {error}")
            return None
        return found if found.path != self.path else None

    @cached_property
    def point_loads(self) -> list[PointLoad | None]:
        """Expert load in the measured interval of each load point; None where nothing was recorded in it."""
        return [self._load_between(*interval(point.requests)) for point in self.points]

    @cached_property
    def whole_load(self) -> PointLoad | None:
        """Expert load from the first measured request to the last, or None where nothing was recorded then."""
        begin, end = interval(self.requests)
        load = self._load_between(*((begin, end) if np.isfinite(end) else (-np.inf, np.inf)))
        return load if load is not None and load.expert_counts_LE.sum() else None

    def _load_between(self, begin: float, end: float) -> PointLoad | None:
        if self.windows is None or np.isnan(begin) or np.isnan(end):
            return None
        load = summed(self.windows.between(begin, end))
        return load if load.windows else None

    @cached_property
    def losses(self) -> list[Loss]:
        """What uneven expert load cost each load point (``join.losses``)."""
        from toolkit.analysis.join import losses  # reads runs

        return losses(self)

    @cached_property
    def num_gpus(self) -> int | None:
        """GPUs (CPU ranks in a rehearsal) of the deployment, from the plan; None when it does not say."""
        value = self.plan.get("num_gpus")
        return value if isinstance(value, int) and value > 0 else None

    def read_all(self) -> None:
        """Reads every part now, so that ``warnings`` and ``missing`` are complete."""
        _ = (self.status, self.manifest, self.plan, self.config, self.overrides, self.points, self.point_loads)
        _ = (self.steps, self.server_metrics, self.nodes, self.slo, self.rebalances, self.baseline)

    def _read(self, name: str, read: Callable[[], T], otherwise: T) -> T:
        if not attempts.present(self.path, name):
            self.missing.append(name)
            return otherwise
        try:
            return read()
        except Exception as error:  # a broken file may raise anything its parser has
            self.warnings.append(f"{name} cannot be read: {type(error).__name__}: {str(error)[:200]}")
            return otherwise

    def _optional(self, name: str, record: type) -> pd.DataFrame:
        """A table that most runs do not have: its lack is no warning."""
        columns = schema_of(record).names
        if not attempts.present(self.path, name):
            return _no_rows(columns)
        return self._read(name, lambda: attempts.table(self.path, name, columns), _no_rows(columns))

    def _mapping(self, name: str) -> dict[str, Any]:
        text = (self.path / name).read_text(encoding="utf-8")
        value = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        if not isinstance(value, dict):
            raise ValueError(f"a mapping is expected, not {type(value).__name__}")
        return value


def _no_rows(columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame({name: [] for name in columns})
