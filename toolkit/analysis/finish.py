"""What is done to a run folder when its load is over, however it ended: complete the sweep, draw, report.

Owns the order of the steps. Can be repeated: the same folder gives the same files. Nothing measured is changed.
"""

from __future__ import annotations

import io
from pathlib import Path

from toolkit.analysis.charts import draw_charts
from toolkit.analysis.findings import best_row, number, verdict
from toolkit.analysis.load import Run
from toolkit.analysis.nodes import point_power
from toolkit.analysis.report import write_report
from toolkit.analysis.steady import steady_figures
from toolkit.analysis.sweep_table import COUNT_COLUMNS
from toolkit.analysis.trust import warnings
from toolkit.records.sweep import write_sweep

TABLE_COLUMNS: dict[str, str] = {
    "concurrency": "conc.",
    "requests": "requests",
    "failed": "failed",
    "cancelled": "cancelled",
    "ttft_p50_ms": "TTFT\np50 ms",
    "ttft_p99_ms": "TTFT\np99 ms",
    "itl_p50_ms": "ITL\np50 ms",
    "itl_p99_ms": "ITL\np99 ms",
    "tpot_p50_ms": "TPOT\np50 ms",
    "output_tok_s": "output\ntok/s",
    "output_tok_s_per_gpu": "tok/s\nper GPU",
    "output_tok_s_per_user": "tok/s\nper user",
    "balancedness_mean": "balance",
}


def finish_run(run_dir: Path) -> str:
    """Completes the run folder ``run_dir`` and returns a short table for the terminal.

    Fills ``balancedness_mean`` and ``imbalance_max`` of sweep.csv from experts.npz, draws charts/*.png and writes
    report.html. Works on what a failed or interrupted run left; what is missing is said in the report.

    Raises:
        ValueError: ``run_dir`` is not a run folder.
    """
    run = Run(run_dir)
    complete_sweep(run)
    write_report(run, draw_charts(run))
    return terminal_table(run)


def complete_sweep(run: Run) -> None:
    """Puts the figures from experts.npz into the sweep and writes it, unless there is no row to write."""
    for position, load in enumerate(run.point_loads):
        if load is not None:
            run.sweep.loc[position, "balancedness_mean"] = load.balancedness_mean
            run.sweep.loc[position, "imbalance_max"] = load.imbalance_max
    for position, point in enumerate(run.points):
        if len(point.requests):  # a sweep.csv of an older version has no steady state
            for name, value in steady_figures(point.requests, point.concurrency).items():
                run.sweep.loc[position, name] = value
    for position, watts in enumerate(point_power(run)):
        run.sweep.loc[position, "power_w"] = watts
    run.sweep["output_tok_s_per_w"] = run.sweep["output_tok_s"] / run.sweep["power_w"]
    if len(run.sweep):
        rows = run.sweep.astype(object).to_dict("records")
        write_sweep(run.path, [{str(name): value for name, value in row.items()} for row in rows])


def terminal_table(run: Run, width: int = 116) -> str:
    """The sweep, the verdict and the warnings as plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = {key: title for key, title in TABLE_COLUMNS.items() if key != "cancelled" or run.sweep[key].any()}
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    best = best_row(run)
    for position, (_, row) in enumerate(run.sweep.iterrows()):
        cells = [f"{row[key]:.0f}" if key in COUNT_COLUMNS else number(float(row[key])) for key in columns]
        mark = "*" if position == best else "!" if row["state"] == "invalid" else " "
        table.add_row(cells[0] + mark, *cells[1:])
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None)
    wide = Console(file=out, width=max(width, 132), force_terminal=False, color_system=None)  # no column is cut off
    console.print(Text(run.name))
    if len(run.sweep):
        wide.print(table)
    for finding in verdict(run):
        console.print(Text(f"{finding.label}: {finding.text}"))
    for warning in warnings(run):
        console.print(Text(f"! {warning}"))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
