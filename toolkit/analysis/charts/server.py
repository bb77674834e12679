"""What the server said of itself while it was loaded. Names come from toolkit/analysis/server.py."""

from __future__ import annotations

from urllib.parse import urlsplit

from matplotlib.figure import Figure

from toolkit.analysis import style
from toolkit.analysis.charts.registry import chart
from toolkit.analysis.load import Run
from toolkit.analysis.server import FIGURES, series
from toolkit.analysis.timeline import phases


@chart(
    "server_metrics",
    "The server's own /metrics over the run, all its DP ranks together. Load points are separated by lines and named "
    "at the top. Look for: requests waiting while KV use is low (a limit on the batch, not on memory); running below "
    "the concurrency with none waiting (requests are held up before the engine: the client, a router); KV use at "
    "100 % (preemptions follow); generated tok/s that differ from those of the timeline, which the client counted.",
)
def draw_server_metrics(run: Run) -> Figure:
    found = series(run)
    if not found:
        raise ValueError("no /metrics of a server that is known was kept (load.scrape)")
    shown = [figure for figure in FIGURES if any(one.figure is figure for one in found)]
    points = phases(run)
    begin = points[0].begin if points else min(float(one.times[0]) for one in found)
    fig = style.figure("The server's own figures", run.name, width=10, height=1.2 + 1.7 * len(shown))
    panels = fig.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    urls = sorted({one.url for one in found})
    for ax, figure in zip(panels, shown, strict=True):
        for one in found:
            if one.figure is figure:
                look = style.LINES[urls.index(one.url) % len(style.LINES)]
                label = f"{one.name} ({urlsplit(one.url).netloc})"
                ax.plot(one.times - begin, one.values, linewidth=1.3, color=look["color"],
                        linestyle=look["linestyle"], label=label)  # fmt: skip
        style.axes(ax, "seconds since the first request" if ax is panels[-1] else "", figure.title)
        ax.set_ylim(0, 105 if figure.key == "kv_use" else max(1.0, ax.get_ylim()[1]))
        ax.legend(fontsize=7, frameon=False, loc="upper left")
    style.spans(list(panels), [(phase.begin - begin, phase.end - begin, f"{phase.concurrency}") for phase in points])
    if points:
        panels[0].set_xlim(0, max(phase.end for phase in points) - begin)
    return fig
