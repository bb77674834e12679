"""From a run folder to charts and a report. Reads files only; knows neither the engine nor torch.

Import-light, because the load generator imports metrics.py and what is built on it.
Read first: metrics.py (the definitions), then load.py (``Run``) and runs.py (``Runs``).
"""

from __future__ import annotations

from typing import Any

__all__ = ["Run", "Runs"]


def __getattr__(name: str) -> Any:
    if name == "Run":
        from toolkit.analysis.load import Run

        return Run
    if name == "Runs":
        from toolkit.analysis.runs import Runs

        return Runs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
