"""What redundant slots and GPUs buy: balancedness over a grid of both, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import ArrayLike

from toolkit.engine.eplb import maps
from toolkit.engine.eplb.planner import plan
from toolkit.records.files import replacing


@dataclass(frozen=True)
class Point:
    """One plan: mean balancedness over layers with load, and the same at the lower bound."""

    gpus: int
    slots: int
    balancedness: float
    bound: float
    deepseek: float


def curve(
    load_LE: ArrayLike,
    experts: int,
    gpus: Sequence[int],
    redundant: Sequence[int],
    groups: int,
    nodes: int,
    policy: str,
) -> list[Point]:
    """Plans every combination; slots are rounded up to a multiple of the GPUs, and each is planned once."""
    points = []
    for g in gpus:
        for slots in sorted({-(-(experts + extra) // g) * g for extra in redundant}):
            ours = plan(load_LE, slots, groups, nodes, g, policy=policy)
            theirs = plan(load_LE, slots, groups, nodes, g, policy="deepseek") if ours.policy != "spill" else None
            points.append(
                Point(
                    g,
                    slots,
                    maps.mean_balancedness(ours.balancedness_L),
                    maps.mean_balancedness(ours.bound_L),
                    maps.mean_balancedness(theirs.balancedness_L) if theirs else float("nan"),
                )
            )
    return points


def table(points: Sequence[Point], experts: int) -> str:
    """One line a point."""
    lines = [
        f"{'GPUs':>5} {'slots':>6} {'redundant':>9} {'a GPU':>6} {'balancedness':>13} {'bound':>7} {'DeepSeek':>9}"
    ]
    for p in points:
        lines.append(
            f"{p.gpus:5} {p.slots:6} {p.slots - experts:9} {p.slots // p.gpus:6} {p.balancedness:13.4f} {p.bound:7.4f} "
            f"{p.deepseek:9.4f}"
        )
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """A line for each number of GPUs: balancedness against slots, the lower bound dashed; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, gpus in enumerate(sorted({p.gpus for p in points})):
        mine = [p for p in points if p.gpus == gpus]
        slots, colour = [p.slots for p in mine], f"C{index}"
        axes.plot(slots, [p.balancedness for p in mine], marker="o", color=colour, label=f"{gpus} GPUs")
        axes.plot(slots, [p.bound for p in mine], linestyle="--", linewidth=0.8, color=colour)
    axes.set(xlabel="slots (experts and redundant ones)", ylabel="balancedness: mean / max GPU load", ylim=(0, 1.02))
    axes.set_title(f"{title}; dashed: proven bound", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path, "wb") as out:
        figure.savefig(out, format="png", dpi=130)
