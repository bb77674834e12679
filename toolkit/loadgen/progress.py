"""How far a sweep is, for a person or for another process. Shows what it is told; measures nothing.

A state is a plain dict, the content of the file that ``progress=`` names::

    {"points": 4, "point": 1, "concurrency": 2, "request_rate": 0.0, "phase": "measure", "done": 3, "total": 6,
     "failed": 0, "cancelled": 0, "output_tok_s": 13.2, "latencies": {}, "elapsed_s": 4.1}

``point`` counts from 0; ``phase`` is warm-up, measure, read (all answers are there and are being parsed) or done;
``done`` of ``total`` are requests of this point, the warm-up's included, as are ``failed`` and those that were
``cancelled`` as load.cancel_fraction asks; ``output_tok_s`` is a guess, one token a read,
until the phase is done; ``latencies`` has the medians of TTFT and TPOT in ms then; ``elapsed_s`` is since this point's
first request; with ``request_rate`` above 0 the point holds a rate, below 0 it replays a trace. The launcher reads that
file and shows it with the same ``ProgressBars``.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from toolkit.records.files import write_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)

FILE_INTERVAL_S = 0.25
LINE_INTERVAL_S = 5.0


class Reporter(Protocol):
    """Something that is told the state of the sweep a few times a second."""

    def update(self, state: dict[str, Any]) -> None: ...


class ProgressFile:
    """Keeps a JSON file at the last state: whole at any time, written at most four times a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = -FILE_INTERVAL_S
        self._unwritten: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._unwritten is not None:
            write_json(self.path, self._unwritten)

    def update(self, state: dict[str, Any]) -> None:
        self._unwritten = state
        if time.monotonic() - self._written >= FILE_INTERVAL_S:
            write_json(self.path, state)
            self._written, self._unwritten = time.monotonic(), None


class ProgressBars:
    """A table on a terminal, a line and a bar for each load point; a log line every few seconds elsewhere.

    States may be skipped or repeated: a point that is passed over is shown as complete.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._line: tuple[float, int, str] = (0.0, -1, "")  # when, for which point and phase the last line was

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bars = _bars(self._stream)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, state: dict[str, Any]) -> None:
        state = {"cancelled": 0} | state  # a run that goes on may be of an older version
        if self._bars is not None:
            self._update_bars(self._bars, state)
        else:
            self._update_lines(state)

    def _update_bars(self, bars: Progress, state: dict[str, Any]) -> None:
        point = state["point"]
        if point not in self._tasks:
            for task in bars.tasks:
                bars.update(task.id, completed=task.total)
            name = f"[{point + 1}/{state['points']}] {_load(state)}"
            self._tasks[point] = bars.add_task(
                name, total=state["total"], rate="", latencies="", failed="", cancelled="", phase=""
            )
        bars.update(
            self._tasks[point],
            completed=state["done"],
            total=state["total"],
            rate=f"{state['output_tok_s']:.1f} tok/s",
            latencies=_latencies(state),
            failed=f"{state['failed']} failed" if state["failed"] else "",
            cancelled=f"{state['cancelled']} cancelled" if state["cancelled"] else "",
            phase=state["phase"],
        )

    def _update_lines(self, state: dict[str, Any]) -> None:
        when, point, phase = self._line
        ended = state["phase"] == "done"
        new = state["point"] != point or (ended and phase != "done")
        if not new and (ended or time.monotonic() - when < LINE_INTERVAL_S):
            return
        self._line = (time.monotonic(), state["point"], state["phase"])
        log.info(
            "point %d/%d, %s, %s: %d/%d requests, %d failed, %s%.1f tok/s, %.0f s%s",
            *(state["point"] + 1, state["points"], _load(state)),
            *(state[key] for key in ("phase", "done", "total", "failed")),
            f"{state['cancelled']} cancelled, " if state["cancelled"] else "",
            *(state[key] for key in ("output_tok_s", "elapsed_s")),
            f", {_latencies(state)}" if state["latencies"] else "",
        )


def _latencies(state: dict[str, Any]) -> str:
    return ", ".join(f"{name.upper()} {value:.0f} ms" for name, value in state["latencies"].items())


def _load(state: dict[str, Any]) -> str:
    """What the point asks for, in words."""
    rate = state["request_rate"]
    if rate > 0:
        return f"{rate:g} requests/s"
    return "trace" if rate < 0 else f"concurrency {state['concurrency']}"


def _bars(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[latencies]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}", style="dim"),
        TextColumn("{task.fields[cancelled]}", style="dim"),
        TextColumn("{task.fields[failed]}", style="red"),
        console=Console(file=stream),
        refresh_per_second=4,
    )
