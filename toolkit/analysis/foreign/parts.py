"""What an import gathers from other tools' files, before it is a run folder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from toolkit.analysis.sweep_row import sweep_row
from toolkit.records.experts import ExpertCounts
from toolkit.records.requests import RequestRecord
from toolkit.records.sweep import SWEEP_COLUMNS


@dataclass
class Imported:
    """Requests of load points that have them, sweep rows of those that do not, expert counts, and what to know.

    ``next_point`` numbers load points in the order of the files; ``rows`` holds finished rows by point.
    """

    requests: list[RequestRecord] = field(default_factory=list)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    experts: ExpertCounts | None = None
    model: str = ""
    load: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    next_point: int = 0

    def point(self) -> int:
        self.next_point += 1
        return self.next_point - 1

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def sweep_rows(self, gpus: int) -> list[dict[str, Any]]:
        """One row a load point, in order: from its requests by our definitions, or else the tool's own figures."""
        by_point: dict[int, list[RequestRecord]] = {}
        for record in self.requests:
            by_point.setdefault(record.point, []).append(record)
        rows = []
        for point in range(self.next_point):
            if point in by_point:
                frame = pd.DataFrame([asdict(record) for record in by_point[point]])
                row = sweep_row(frame, by_point[point][0].concurrency, gpus or 1)
            else:
                row = dict.fromkeys(SWEEP_COLUMNS, math.nan) | self.rows[point]
                row["output_tok_s_per_gpu"] = row["output_tok_s"] / (gpus or 1)
            if not gpus:
                row["output_tok_s_per_gpu"] = math.nan
            rows.append(row)
        return rows


def request(point: int, concurrency: int, index: int, **known: Any) -> RequestRecord:
    """A request with what the tool says, everything else empty; ``itls`` become one-token chunks after the first."""
    nan = math.nan
    values: dict[str, Any] = {
        "point": point, "concurrency": concurrency, "request_id": f"{point}-{index}", "prompt_id": "", "warmup": False,
        "status": "ok", "error": "", "http_status": 0, "t_send": nan, "scheduled_s": nan, "first_byte_s": nan,
        "first_token_s": nan, "last_token_s": nan, "end_s": nan, "prompt_tokens": 0, "cached_tokens": 0,
        "output_tokens": 0, "expected_output_tokens": 0, "finish_reason": "", "dp_rank": -1, "chunk_s": [],
        "chunk_tokens": [], "output_text": "",
    }  # fmt: skip
    return RequestRecord(**(values | known))


def chunks(ttft: float, gaps: list[float], tokens: int) -> tuple[list[float], list[int]]:
    """Arrival of each chunk and tokens of each: ``tokens`` spread over the chunks as evenly as whole tokens go.

    A tool that keeps gaps between chunks and a total does not say which chunk held how many; with a token a chunk,
    the usual case, nothing is left open.
    """
    times = [float(t) for t in np.cumsum([ttft, *gaps])]
    if tokens < len(times):
        times = [*times[: max(tokens - 1, 0)], times[-1]] if tokens > 0 else []
    if not times:
        return [], []
    rest = tokens - 1
    later = len(times) - 1
    counts = [1] + [rest // later + (i < rest % later) for i in range(later)] if later else [tokens]
    return times, counts
