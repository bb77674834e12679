"""What the commands of ``python -m toolkit.analysis`` do: each prints a table a person can read and writes files.

Owns the order of things and the files' names; figures come from runs.py, compare.py and load.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from toolkit.analysis.load import Run

TOOLS = {
    "vllm": "vllm bench serve --save-result [--save-detailed], JSON",
    "sglang": "sglang bench_serving --output-file [--output-details], JSONL",
    "aiperf": "profile_export.jsonl or profile_export_aiperf.csv",
    "sglang-experts": "expert_distribution_recorder_*.pt",
    "trtllm-experts": "folder with meta_info.json and rank*.safetensors",
}
LS_COLUMNS = {
    "run": "run", "state": "state", "model": "model", "mapping": "mapping", "gpus": "GPUs", "points": "points",
    "best_concurrency": "best at", "output_tok_s": "tok/s", "output_tok_s_per_gpu": "per GPU",
    "output_tok_s_per_user": "per user", "ttft_p50_ms": "TTFT p50 ms",
}  # fmt: skip


def report(options: argparse.Namespace) -> int:
    from toolkit.analysis.finish import finish_run
    from toolkit.records import REPORT

    code = 0
    for folder in options.run:
        try:
            table = finish_run(folder)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            code = 2
        else:
            sys.stdout.write(f"{table}report: {folder / REPORT}\n")
    return code


def compare(options: argparse.Namespace) -> int:
    from toolkit.analysis import charts
    from toolkit.analysis.charts.several import COMPARE_CAPTION, SHOWN, compare_figure
    from toolkit.analysis.compare import compare as compare_runs
    from toolkit.analysis.runs import Runs

    if len(options.run) < 2:
        raise ValueError(f"run={options.run[0]}: a comparison needs two runs or more; the first is the one to beat")
    runs = Runs(options.run)
    first, *others = runs
    options.out.mkdir(parents=True, exist_ok=True)
    for run in others:
        table = compare_runs(first, run)
        stem = options.out / f"{_slug(first)}__{_slug(run)}"
        table.to_csv(f"{stem}.csv", index=False)
        charts.save(compare_figure(table, first.name, run.name), stem, COMPARE_CAPTION)
        pair = Runs([first, run])
        changed = [f"{name}: {a!r} -> {b!r}" for name in pair.varying for a, b in [pair.settings[name].tolist()]]
        sys.stdout.write(f"A {first.name}\nB {run.name}\n{_lines(changed) or 'the same settings'}\n")
        _print(
            ["conc.", "figure", "A", "B", "B - A", "95 % interval", "change", "verdict"],
            (_compared(row) for row in table[table["figure"].isin(SHOWN)].to_dict("records")),
        )
        sys.stdout.write(f"{_invalid([first, run])}files: {stem}.csv .png .svg\n")
    return 0


def pareto(options: argparse.Namespace) -> int:
    from toolkit.analysis import charts
    from toolkit.analysis.charts.several import PARETO_CAPTION, pareto_figure
    from toolkit.analysis.runs import Runs

    runs = Runs(options.run)
    points = runs.pareto
    figure = pareto_figure(points)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / "pareto"
    points.to_csv(f"{stem}.csv", index=False)
    charts.save(figure, stem, PARETO_CAPTION)
    front = points[points["front"]].sort_values("output_tok_s_per_user", ascending=False)
    _print(
        ["tok/s/user", "tok/s/GPU", "conc.", "mapping", "model", "run"],
        (
            [_number(row["output_tok_s_per_user"]), _number(row["tok_s_per_gpu"]) + "*" * (not row["steady"]),
             f"{row['concurrency']:g}", row["mapping"], row["model"], row["run"]]
            for row in front.to_dict("records")
        ),
    )  # fmt: skip
    if not front["steady"].all():
        sys.stdout.write("* of the whole point, start and tail included: it has no steady state\n")
    sys.stdout.write(f"{len(front)} of {len(points)} points are on the front\n{_invalid(runs)}")
    sys.stdout.write(f"files: {stem}.csv .png .svg\n")
    return 0


def rates(options: argparse.Namespace) -> int:
    from toolkit.analysis import charts
    from toolkit.analysis.charts.rates import RATES_CAPTION, rates_figure
    from toolkit.analysis.goodput import Slo
    from toolkit.analysis.rates import rate_match
    from toolkit.analysis.runs import Runs

    runs = Runs(options.run)
    asked = runs[0].slo
    slo = Slo(ttft_ms=options.ttft_ms or asked.ttft_ms, tpot_ms=options.tpot_ms or asked.tpot_ms)
    table = rate_match(list(runs), slo)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / "rates"
    table.to_csv(f"{stem}.csv", index=False)
    charts.save(rates_figure(table, slo), stem, RATES_CAPTION)
    shown = ["isl", "osl", "prefill_req_s_per_gpu", "ttft_p99_ms", "concurrency", "tpot_ms", "decode_req_s_per_gpu",
             "decode_gpus"]  # fmt: skip
    _print(
        ["ISL", "OSL", "prompts/s/prefill GPU", "TTFT p99 ms", "decode batch", "TPOT ms", "answers/s/decode GPU",
         "decode GPUs a prefill GPU", ""],
        (
            [*(_number(row[name]) for name in shown), "choose" if row["chosen"] else "" if row["keeps"] else "too slow"]
            for row in table.to_dict("records")
        ),
    )  # fmt: skip
    sys.stdout.write(f"{_invalid(runs)}files: {stem}.csv .png .svg\n")
    return 0


def _invalid(runs: Iterable[Run]) -> str:
    """A line for each invalid load point, which no comparison shows."""
    return "".join(
        f"! left out: {run.name} at concurrency {point.concurrency} is invalid: {point.row['reason']}\n"
        for run in runs
        for point in run.points
        if not point.valid
    )


def export(options: argparse.Namespace) -> int:
    from toolkit.analysis.load import Run

    run = Run(options.run)
    out = options.out or run.path / "export"
    out.mkdir(parents=True, exist_ok=True)
    if options.format in ("vllm", "aiperf"):
        from toolkit.analysis.foreign import writing

        sys.stdout.write("".join(f"{path}\n" for path in writing.write(run, options.format, out)))
        return 0
    rows = []
    for name, frame in tables(run):
        path = out / f"{name}.{options.format}"
        _write(frame, path, options.format)
        rows.append([name, f"{len(frame):,}", f"{len(frame.columns)}", str(path)])
    _print(["table", "rows", "columns", "file"], rows)
    run.read_all()
    for warning in [*run.warnings, *([f"missing: {', '.join(run.missing)}"] if run.missing else [])]:
        sys.stdout.write(f"! {warning}\n")
    return 0


def _write(frame: pd.DataFrame, path: Path, kind: str) -> None:
    """Lists are lists in parquet and JSON, and JSON text in a cell of CSV."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [name for name in frame if str(frame[name].dtype).startswith("list")]
    if kind == "parquet":  # without pandas' notes on types, which other readers trip over
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None), path)
        return
    plain = frame.copy(deep=False)
    for name in lists:
        plain[name] = [list(map(float, cell)) for cell in frame[name]]
        if kind == "csv":
            plain[name] = plain[name].map(json.dumps)
    if kind == "csv":
        plain.to_csv(path, index=False)
    else:
        plain.to_json(path, orient="records", double_precision=15)


def tables(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every table of a run that has rows: name and frame."""
    from toolkit.analysis.join import moments

    for name, frame in (
        ("sweep", run.sweep), ("requests", run.requests), ("texts", run.texts), ("steps", run.steps),
        ("moments", moments(run)), ("server_metrics", run.server_metrics), ("nodes", run.nodes),
    ):  # fmt: skip
        if len(frame):
            yield name, frame


def ls(options: argparse.Namespace) -> int:
    from toolkit.analysis.runs import Runs

    if not options.folder.is_dir():
        raise ValueError(f"folder={options.folder} is not a folder: name the one that runs are made in")
    runs = Runs.glob(str(options.folder / "*"), str(options.folder / "*" / "*"))
    if not len(runs):
        raise ValueError(f"folder={options.folder} holds no run folder")
    table = runs.table
    if options.format == "csv":
        sys.stdout.write(table.to_csv(index=False))
    elif options.format == "json":
        sys.stdout.write(table.to_json(orient="records", indent=2) + "\n")
    else:
        cells = ([_cell(row[name]) for name in LS_COLUMNS] for row in table.to_dict("records"))
        _print(list(LS_COLUMNS.values()), cells)
    return 0


def import_results(options: argparse.Namespace) -> int:
    from toolkit.analysis.foreign import import_run

    folder = import_run(options.tool, options.file, options.results, options.name, options.gpus, options.ep_size)
    sys.stdout.write(f"imported: {folder}\nreport:   python -m toolkit.analysis report {folder}\n")
    return 0


def _compared(row: dict[Any, Any]) -> Sequence[str]:
    interval = f"{_number(row['low'])} to {_number(row['high'])}" if math.isfinite(row["low"]) else "–"
    return [f"{row['concurrency']:g}", row["figure"], _number(row["a"]), _number(row["b"]), _number(row["difference"]),
            interval, f"{row['change']:+.1%}", row["verdict"]]  # fmt: skip


def _slug(run: Run) -> str:
    return run.name.replace("/", "-")


def _lines(items: list[str]) -> str:
    return "\n".join(f"  {item}" for item in items)


def _number(value: float) -> str:
    from toolkit.analysis.findings import number

    return number(float(value))


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:g}" if float(value).is_integer() else _number(value)
    return "–" if value is None else str(value)


def _print(titles: list[str], rows: Iterator[Sequence[str]] | list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    width = 120 if sys.stdout.isatty() else 200
    Console(file=sys.stdout, width=width, force_terminal=False, color_system=None).print(table)
