"""``Runs``: many run folders at once, their settings as columns, so that any two settings can be compared.

Owns the stacking, what varies between runs, and the Pareto front. One run is load.py's.
Read next: compare.py.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit.analysis.findings import best_row
from toolkit.analysis.levels import combine, steady_per_gpu
from toolkit.analysis.load import Run

# What differs between any two runs and says nothing of what was measured.
INCIDENTAL = ("run", "exp", "dry_run", "resume", "run_dir", "emit", "cluster.port", "cluster.results_dir")
INCIDENTAL_GROUPS = ("rehearsal.", "model.", "health.")  # ``model`` itself says which model


class Runs:
    """Several runs, in the order given.

    Args:
        runs: ``Run`` objects, or paths of run folders.

    Raises:
        ValueError: a path is not a run folder.
    """

    def __init__(self, runs: Iterable[Run | Path | str]) -> None:
        self._runs = [run if isinstance(run, Run) else Run(run) for run in runs]

    @classmethod
    def glob(cls, *patterns: str) -> Runs:
        """Every run folder that matches, once, by name: ``Runs.glob("results/*/*")``. Other folders are passed over."""
        found: dict[Path, Run] = {}
        for pattern in patterns:
            for name in sorted(glob.glob(str(Path(pattern).expanduser()))):  # noqa: PTH207  patterns may be absolute
                try:
                    run = Run(name)
                except ValueError:
                    continue
                found.setdefault(run.path, run)
        return cls(found.values())

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __getitem__(self, index: int) -> Run:
        return self._runs[index]

    @cached_property
    def settings(self) -> pd.DataFrame:
        """One row a run: every config key (``parallel.ep_size``), ``run``, ``model``, ``mapping``, ``num_gpus``."""
        return pd.DataFrame([run.settings for run in self._runs])

    @property
    def varying(self) -> list[str]:
        """The settings in which the runs differ, but for names, ports and folders."""
        return [
            str(name)
            for name in self.settings.columns
            if name not in INCIDENTAL
            and not str(name).startswith(INCIDENTAL_GROUPS)
            and self.settings[name].map(repr).nunique() > 1
        ]

    @cached_property
    def sweep(self) -> pd.DataFrame:
        """Every load point of every run: its settings, then the columns of ``sweep.csv``."""
        return self._stack([run.sweep for run in self._runs])

    @property
    def requests(self) -> pd.DataFrame:
        """Every request of every run with its run's settings. Large: pick runs first."""
        return self._stack([run.requests for run in self._runs])

    @cached_property
    def combined(self) -> pd.DataFrame:
        """One row a (settings, concurrency), repeats put together (``levels.combine``), with ``runs``: how many."""
        keys = [tuple(repr(run.settings.get(name)) for name in self.varying) for run in self._runs]
        tables = []
        for key in dict.fromkeys(keys):
            same = [run for run, other in zip(self._runs, keys, strict=True) if other == key]
            levels = combine(point for run in same for point in run.points if point.valid)
            if len(levels):
                tables.append(_with_settings(levels.assign(runs=len(same)), same[0].settings))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    @cached_property
    def pareto(self) -> pd.DataFrame:
        """Valid load points, tok/s/GPU against tok/s/user: run, model, mapping, concurrency, ``output_tok_s_per_user``,
        ``tok_s_per_gpu`` and ``steady`` (``levels.steady_per_gpu``), ``front``: on the front."""
        rows = self.sweep
        rows = rows[rows["state"] != "invalid"] if len(rows) else rows
        if rows.empty:
            return pd.DataFrame()
        x, y = "output_tok_s_per_user", "tok_s_per_gpu"
        rows = rows[["run", "model", "mapping", "concurrency", x]].join(steady_per_gpu(rows))
        rows = rows.dropna(subset=[x, y]).reset_index(drop=True)
        rows["front"] = front(rows[x].to_numpy(np.float64), rows[y].to_numpy(np.float64))
        return rows

    @property
    def table(self) -> pd.DataFrame:
        """One row a run: name, state, model, mapping, GPUs, and the best load point."""
        return pd.DataFrame([_summary(run) for run in self._runs])

    def _stack(self, frames: list[pd.DataFrame]) -> pd.DataFrame:
        filled = [
            _with_settings(frame, run.settings)
            for frame, run in zip(frames, self._runs, strict=True)
            if not frame.empty
        ]
        return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points no other dominates: none is at least as good in both and better in one. Larger is better."""
    order = np.lexsort((-y, -x))
    on_front = np.zeros(len(x), bool)
    best, best_x = -np.inf, np.nan
    for index in order:
        if y[index] > best or (y[index] == best and x[index] == best_x):
            on_front[index] = True
            best, best_x = y[index], x[index]
    return on_front


def _with_settings(frame: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """``frame`` with the settings as constant columns in front; a column it has itself stays as it is."""
    extra = {name: [value] * len(frame) for name, value in settings.items() if name not in frame.columns}
    return pd.concat([pd.DataFrame(extra, index=frame.index), frame], axis=1)


def _summary(run: Run) -> dict[str, Any]:
    position = best_row(run)
    best: Any = run.sweep.iloc[position] if position is not None else {}
    return {
        "run": run.name,
        "state": run.state or "unknown",
        "model": run.settings["model"],
        "mapping": run.mapping,
        "gpus": run.num_gpus,
        "points": len(run.sweep),
        "best_concurrency": best.get("concurrency"),
        "output_tok_s": best.get("output_tok_s"),
        "output_tok_s_per_gpu": best.get("output_tok_s_per_gpu"),
        "output_tok_s_per_user": best.get("output_tok_s_per_user"),
        "ttft_p50_ms": best.get("ttft_p50_ms"),
        "path": str(run.path),
    }
