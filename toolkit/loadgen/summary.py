"""The table at the end of a sweep: text for a terminal or a log. Derives nothing (analysis/metrics.py does)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from toolkit.loadgen.proof import VERDICTS
from toolkit.records.status import PointStatus, RunStatus

COLUMNS = {
    "concur-\nrency": "concurrency",
    "requests\n/s asked": "request_rate",
    "requests": "requests",
    "failed": "failed",
    "cancelled": "cancelled",
    "TTFT p50\nms": "ttft_p50_ms",
    "TTFT p99\nms": "ttft_p99_ms",
    "ITL p50\nms": "itl_p50_ms",
    "ITL p99\nms": "itl_p99_ms",
    "TPOT p50\nms": "tpot_p50_ms",
    "output\ntok/s": "output_tok_s",
}


def render(rows: Sequence[dict[str, Any]], status: RunStatus) -> str:
    """A line for each load point that has a row, then what did not end well, and why."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sweep: {status.state}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    unused = {key for key in ("request_rate", "cancelled") if not any(row[key] for row in rows)}
    columns = {name: key for name, key in COLUMNS.items() if key not in unused}
    judged = [point for point in status.points if point.client is not None]
    slo = any(point.good_share is not None for point in judged)
    for name in (*columns, *(["good"] if slo else []), "client", "state"):
        table.add_column(name, justify="right")
    for row, point in zip(rows, judged, strict=True):
        share = ["-" if point.good_share is None else f"{point.good_share:.1%}"] if slo else []
        verdict = point.client.verdict if point.client is not None else "-"
        table.add_row(*(_cell(row[key]) for key in columns.values()), *share, verdict, row["state"])
    text = io.StringIO()
    console = Console(file=text, width=160)
    if rows:
        console.print(table)
    for point in status.points:
        if point.reason:
            console.print(f"{_name(point)}: {point.state}: {point.reason}", markup=False, soft_wrap=True)
    for point in status.points:
        client = point.client
        if client is not None and client.reasons and VERDICTS[client.verdict] not in point.reason:
            said = f"{client.verdict}: {VERDICTS[client.verdict]}: {'; '.join(client.reasons)}"
            console.print(f"{_name(point)}: {said}", markup=False, soft_wrap=True)
    if status.reason and not any(point.reason for point in status.points):
        console.print(f"{status.state}: {status.reason}", markup=False)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def _name(point: PointStatus) -> str:
    return f"{point.request_rate:g} requests/s" if point.request_rate else f"concurrency {point.concurrency}"


def _cell(value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.1f}"
