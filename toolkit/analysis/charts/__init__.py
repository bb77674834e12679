"""The charts of a run folder and of several runs. Importing this registers all of them.

The order of the imports is the order in the report.
"""

from __future__ import annotations

# isort: off
from toolkit.analysis.charts import (  # noqa: F401
    latency, throughput, timeline, server, joined, experts, rebalances, handoffs, nodes, against,
)  # fmt: skip

# isort: on
from toolkit.analysis.charts.registry import CHARTS, Chart, Drawn, chart, draw_charts, save

__all__ = ["CHARTS", "Chart", "Drawn", "chart", "draw_charts", "save"]
