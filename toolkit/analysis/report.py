"""``report.html``: one self-contained page about a run, without scripts, links or anything to fetch.

Owns what stands where on the page; the sentences are findings.py's, the pictures charts.py's, the markup
templates/report.html's. Everything from the run folder is escaped.
Read next: finish.py.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from toolkit import records
from toolkit.analysis import against, rebalances
from toolkit.analysis.charts import Drawn
from toolkit.analysis.findings import best_row, expert_summary, number, verdict
from toolkit.analysis.load import Run
from toolkit.analysis.sweep_table import COUNT_COLUMNS
from toolkit.analysis.trust import warnings
from toolkit.records.files import replacing


@dataclass(frozen=True)
class Column:
    """A column of the sweep table: its short title and its name in ``sweep.csv``."""

    title: str
    key: str


@dataclass(frozen=True)
class Group:
    """Columns under one heading."""

    title: str
    columns: tuple[Column, ...]


def _percentiles(metric: str) -> Group:
    return Group(f"{metric.upper()}, ms", tuple(Column(p, f"{metric}_{p}_ms") for p in ("p50", "p99")))


GROUPS: tuple[Group, ...] = (
    Group(
        "load",
        (
            Column("conc.", "concurrency"),
            Column("requests", "requests"),
            Column("failed", "failed"),
            Column("cancelled", "cancelled"),
        ),
    ),
    Group("seconds", (Column("duration", "duration_s"),)),
    Group("mean tokens", (Column("ISL", "isl_mean"), Column("OSL", "osl_mean"))),
    *(_percentiles(metric) for metric in ("ttft", "itl", "tpot", "e2e")),
    Group(
        "output tok/s",
        (
            Column("all", "output_tok_s"),
            Column("per GPU", "output_tok_s_per_gpu"),
            Column("per user", "output_tok_s_per_user"),
        ),
    ),
    Group("power", (Column("W", "power_w"), Column("tok/s/W", "output_tok_s_per_w"))),
    Group("GPU load", (Column("balance", "balancedness_mean"), Column("max/mean", "imbalance_max"))),
)


def _groups(run: Run) -> list[Group]:
    """Columns that say something: power is known on few machines, and few loads give requests up."""
    silent = set() if run.sweep["power_w"].notna().any() else {"power_w", "output_tok_s_per_w"}
    silent |= set() if run.sweep["cancelled"].any() else {"cancelled"}
    groups = [Group(group.title, tuple(c for c in group.columns if c.key not in silent)) for group in GROUPS]
    return [group for group in groups if group.columns]


def write_report(run: Run, charts: Iterable[Drawn]) -> Path:
    """Writes the page into the run folder, replacing an earlier one, and returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("toolkit.analysis"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html").render(
        name=run.name,
        subtitle=_subtitle(run),
        verdict=verdict(run),
        warnings=warnings(run),
        groups=_groups(run),
        sweep=_sweep_rows(run),
        experts=[*expert_summary(run), *rebalances.sentences(run)],
        rebalances=rebalances.table(run),
        against=(against.TITLES, against.table(run)),
        against_names=(run.baseline.name, run.name, _changed(run)) if run.baseline is not None else None,
        charts=[
            {
                "name": chart.name,
                "caption": chart.caption,
                "problem": chart.problem,
                "data": base64.b64encode(chart.path.read_bytes()).decode() if chart.path else "",
            }
            for chart in charts
        ],
        overrides=run.overrides,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        provenance=_provenance(run.manifest),
    )
    path = run.path / records.REPORT
    with replacing(path, "wb") as out:
        out.write(page.encode())
    return path


def _changed(run: Run) -> list[str]:
    """The settings in which the run differs from the one that it is compared with."""
    assert run.baseline is not None
    left, right = run.baseline.settings, run.settings
    names = sorted(set(left) | set(right))
    return [
        f"{name}: {left.get(name)!r} → {right.get(name)!r}"
        for name in names
        if left.get(name) != right.get(name) and name not in ("run", "exp", "compare_with", "cluster.port")
    ]


def _subtitle(run: Run) -> str:
    """Model, mapping and size of the deployment, as far as the folder says."""
    model, engine = (_group(run.config, name) for name in ("model", "engine"))
    parts = [str(model["name"])] if "name" in model else []
    parts += [run.mapping] if run.mapping else []
    parts += [str(engine["moe_a2a_backend"])] if "moe_a2a_backend" in engine else []
    parts += [f"{run.num_gpus} GPUs or ranks"] if run.num_gpus else []
    parts += [f"state: {run.state}"] if run.status else []
    return " · ".join(parts)


def _group(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _sweep_rows(run: Run) -> list[dict[str, Any]]:
    best = best_row(run)
    return [
        {
            "best": position == best,
            "invalid": row["reason"] or "no reason was given" if row["state"] == "invalid" else "",
            "groups": [[_cell(column.key, row[column.key]) for column in group.columns] for group in _groups(run)],
        }
        for position, (_, row) in enumerate(run.sweep.iterrows())
    ]


def _cell(key: str, value: float) -> str:
    return f"{value:,.0f}" if key in COUNT_COLUMNS else number(float(value))


def _provenance(manifest: dict[str, Any]) -> dict[str, Any]:
    """Plain values first, then one section for each nested mapping, its keys dotted."""
    nested = {key: value for key, value in manifest.items() if isinstance(value, dict)}
    top = [(key, _text(value)) for key, value in manifest.items() if key not in nested]
    return {"top": top, "sections": [(key, list(_flat(value, ""))) for key, value in nested.items()]}


def _flat(values: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
