"""The table at the end of a sweep: text for a terminal or a log. Derives nothing (analysis/metrics.py does)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from toolkit.records import RunStatus

COLUMNS = {
    "concurrency": "concurrency",
    "requests": "requests",
    "failed": "failed",
    "TTFT p50\nms": "ttft_p50_ms",
    "TTFT p99\nms": "ttft_p99_ms",
    "ITL p50\nms": "itl_p50_ms",
    "ITL p99\nms": "itl_p99_ms",
    "TPOT p50\nms": "tpot_p50_ms",
    "output\ntok/s": "output_tok_s",
}


def render(rows: Sequence[dict[str, Any]], status: RunStatus) -> str:
    """A line for each load point that has a row, then what did not end well, and why."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sweep: {status.state}", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in COLUMNS.values()))
    text = io.StringIO()
    console = Console(file=text, width=120)
    if rows:
        console.print(table)
    for point in status.points:
        if point.reason:
            console.print(f"concurrency {point.concurrency}: {point.state}: {point.reason}", markup=False)
    if status.reason and not any(point.reason for point in status.points):
        console.print(f"{status.state}: {status.reason}", markup=False)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def _cell(value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.1f}"
