"""Charts by name: what a chart is, and how all charts of a run are drawn.

Owns the registry and the files (PNG and SVG, caption inside both). A chart that cannot be drawn says why, and the
others are drawn. style.py owns the look, metrics.py and imbalance.py the figures.
Read next: latency.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from toolkit import records
from toolkit.analysis import style
from toolkit.analysis.load import Run
from toolkit.records.files import replacing
from toolkit.registry import Registry

Draw = Callable[[Run], Figure]


class NotAsked(ValueError):
    """A chart is of something that the run did not do: it is left out without a word."""


@dataclass(frozen=True)
class Chart:
    """How a chart is drawn, and what its reader should look for. ``draw`` raises ``ValueError`` if there is no data."""

    draw: Draw
    caption: str


@dataclass(frozen=True)
class Drawn:
    """A chart of a run: its PNG (the SVG lies beside it), or the reason why there is none."""

    name: str
    caption: str
    path: Path | None
    problem: str = ""


CHARTS: Registry[Chart] = Registry("chart")


def chart(name: str, caption: str) -> Callable[[Draw], Draw]:
    """Decorator: registers a drawing function as the chart ``name``."""

    def add(draw: Draw) -> Draw:
        CHARTS.register(name)(Chart(draw, caption))
        return draw

    return add


def draw_charts(run: Run) -> list[Drawn]:
    """Draws every registered chart into the run's charts folder, replacing those of an earlier call."""
    folder = run.path / records.CHARTS
    folder.mkdir(exist_ok=True)
    drawn = []
    for name in CHARTS:
        made = CHARTS[name]
        try:
            path = save(made.draw(run), folder / name, made.caption)
            drawn.append(Drawn(name, made.caption, path))
        except NotAsked:
            _remove(folder, name)
        except Exception as error:  # one chart must not cost the others
            _remove(folder, name)
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            drawn.append(Drawn(name, made.caption, None, why))
    return drawn


def _remove(folder: Path, name: str) -> None:
    for kind in ("png", "svg"):
        (folder / f"{name}.{kind}").unlink(missing_ok=True)


def save(fig: Figure, stem: Path, caption: str) -> Path:
    """Writes ``<stem>.png`` and ``<stem>.svg``, both with the caption as their description; returns the PNG's path."""
    fig.draw_without_rendering()  # places everything, which takes as long as drawing it: once for both files
    fig.set_layout_engine(None)
    png = stem.with_name(f"{stem.name}.png")
    with replacing(stem.with_name(f"{stem.name}.svg"), "wb") as out, mpl.rc_context({"svg.hashsalt": "chart"}):
        fig.savefig(out, format="svg", metadata={"Description": caption, "Date": None})
    with replacing(png, "wb") as out:
        fig.savefig(out, format="png", dpi=style.DPI, metadata={"Description": caption})
    return png
