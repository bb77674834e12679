"""From a run folder to charts and a report. Reads files only; knows neither the engine nor torch.

Import-light, because the load generator imports ``toolkit.analysis.metrics``.
Read first: metrics.py (the definitions), then load.py (``Run``).
"""

from __future__ import annotations

from typing import Any

__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    if name == "Run":
        from toolkit.analysis.load import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
