"""``sweep.csv``: one line for each load point.

Does not know how its figures are computed: analysis/sweep_row.py.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.records import SWEEP
from toolkit.records.files import replacing

if TYPE_CHECKING:
    import pandas as pd


SWEEP_COLUMNS: tuple[str, ...] = (
    "concurrency", "requests", "failed", "cancelled", "duration_s", "isl_mean", "osl_mean",
    *(f"{name}_{stat}_ms" for name in ("ttft", "itl", "tpot", "e2e") for stat in ("mean", "p50", "p90", "p99")),
    "output_tok_s", "output_tok_s_per_gpu", "output_tok_s_per_user", "total_tok_s",
    "balancedness_mean", "imbalance_max", "steady_s", "steady_output_tok_s",
    "request_rate",
    *(f"{name}_{stat}_ms" for name in ("ttft_sched", "e2e_sched", "ttfb", "ttfo", "icl")
      for stat in ("mean", "p50", "p90", "p99")),
    *(f"steady_{name}_{stat}_ms" for name in ("ttft", "itl", "tpot", "e2e") for stat in ("p50", "p99")),
    "power_w", "output_tok_s_per_w", "repeat", "state", "reason",
)  # fmt: skip
SWEEP_TEXTS = ("state", "reason")


def write_sweep(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """``rows`` hold every one of ``SWEEP_COLUMNS``; NaN is written as an empty cell."""
    with replacing(folder / SWEEP, "w") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(SWEEP_COLUMNS)
        for row in rows:
            writer.writerow([_cell(row[name]) for name in SWEEP_COLUMNS])


def read_sweep(folder: Path) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(folder / SWEEP)
    return table.assign(**{name: table[name].fillna("").astype(str) for name in SWEEP_TEXTS if name in table})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, str):
        return " ".join(value.split())  # a reason may quote a server; one line a load point
    return value
