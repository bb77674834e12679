"""``sweep.csv`` as a table that fits the requests: checked, and with rows for the load points that it lacks.

Knows the file and its columns; what a row holds is sweep_row.py's. Read next: load.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import records
from toolkit.analysis.sweep_row import counts, sweep_row
from toolkit.records.status import PointStatus
from toolkit.records.sweep import SWEEP_COLUMNS, SWEEP_TEXTS, read_sweep

NEEDED = ("concurrency", "requests", "failed")
COUNT_COLUMNS = (*NEEDED, "cancelled")


@dataclass(frozen=True)
class LoadPoint:
    """One load point: the requests sent in it (warm-up included) and its row of the sweep."""

    concurrency: int
    requests: pd.DataFrame
    row: pd.Series[Any]

    @property
    def valid(self) -> bool:
        """Whether its figures may be compared: False for a point that the validity gate has found wanting."""
        return self.row.get("state") != "invalid"


def read_whole(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The file with all of our columns, and the names of those that it lacks: they are empty.

    Raises:
        ValueError: it is cut off, or lacks what no row can do without.
    """
    if not (folder / records.SWEEP).read_bytes().endswith(b"\n"):
        raise ValueError("its last line is cut off")
    table = read_sweep(folder)
    lacking = [name for name in SWEEP_COLUMNS if name not in table.columns]
    if set(lacking) & set(NEEDED):
        raise ValueError(f"no column {', '.join(lacking)}")
    texts = {name: table.get(name, "") for name in SWEEP_TEXTS}
    table = table.reindex(columns=list(SWEEP_COLUMNS)).drop(columns=[*texts]).astype(np.float64)
    if table[list(NEEDED)].isna().any(axis=None):
        raise ValueError(f"an empty cell in {', '.join(NEEDED)}")
    table = table.fillna({"repeat": 0, "cancelled": 0})
    table = table.astype(dict.fromkeys((*COUNT_COLUMNS, "repeat"), np.int64)).assign(**texts)
    return pd.DataFrame(table[list(SWEEP_COLUMNS)]), lacking


def recounted(table: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """The rows with their counts of requests taken anew: ``failed`` of version 1 held the cancelled ones too."""
    table = table.copy()
    for point, row in rows_by_point(requests, table).items():
        for name, count in counts(requests[requests["point"] == point]).items():
            table.loc[table.index[row], name] = count
    return table


def rows_by_point(requests: pd.DataFrame, sweep: pd.DataFrame) -> dict[Any, int]:
    """Load point index -> position of its row: the first row of the same concurrency not yet taken."""
    free = list(enumerate(sweep["concurrency"]))
    found: dict[Any, int] = {}
    for point, concurrency in requests.groupby("point", sort=True)["concurrency"].first().items():
        match = next((entry for entry in free if entry[1] == concurrency), None)
        if match is not None:
            free.remove(match)
            found[point] = match[0]
    return found


def missing_rows(
    table: pd.DataFrame, requests: pd.DataFrame, num_gpus: int | None, points: Sequence[PointStatus]
) -> pd.DataFrame:
    """Rows computed from the requests for the load points that have none; ``points``: what is known of their state."""
    claimed = rows_by_point(requests, table)
    rows = []
    for point, sent in requests.groupby("point", sort=True):
        if point in claimed or sent["warmup"].all():
            continue
        row = sweep_row(sent, int(sent["concurrency"].iloc[0]), num_gpus or 1)
        if num_gpus is None:
            row["output_tok_s_per_gpu"] = np.nan
        number = int(sent["point"].iloc[0])
        status = points[number] if 0 <= number < len(points) else PointStatus(0, "done")
        rows.append(row | {"state": status.state, "reason": status.reason, "repeat": status.repeat})
    return pd.DataFrame(rows, columns=list(SWEEP_COLUMNS))


def load_points(requests: pd.DataFrame, sweep: pd.DataFrame) -> list[LoadPoint]:
    """The load points, in the order of ``sweep``; ``requests`` are sorted by point."""
    by_row = {row: point for point, row in rows_by_point(requests, sweep).items()}
    number = requests["point"].to_numpy()
    points = []
    for index, (_, row) in enumerate(sweep.iterrows()):
        point = by_row.get(index, np.nan)
        begin, end = np.searchsorted(number, point, "left"), np.searchsorted(number, point, "right")
        points.append(LoadPoint(int(row["concurrency"]), requests.iloc[begin:end], row))  # a slice, not a copy
    return points
