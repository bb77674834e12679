"""What crosses nodes: expert load and tokens laid over the nodes of the plan.

Owns the way from EP and DP ranks to nodes. The share itself is imbalance.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from toolkit.analysis.imbalance import WindowLoads, cross_node_share
from toolkit.analysis.load import Run
from toolkit.analysis.metrics import interval

Floats = NDArray[np.float64]


def cross_node(run: Run) -> pd.DataFrame:
    """One row a load point with recorder windows: ``concurrency``, ``share`` of the assignments that leave their node.

    Raises:
        ValueError: one node, no expert counts, or a plan that does not say where ranks are.
    """
    if run.windows is None:
        raise ValueError("no expert counts were recorded")
    node_of_ep, nodes_of_dp = topology(run)
    if len(set(node_of_ep.tolist())) < 2:
        raise ValueError("all EP ranks are on one node: nothing crosses")
    rows = []
    for point in run.points:
        begin, end = interval(point.requests)
        if np.isfinite(end) and len((windows := run.windows.between(begin, end)).times_W2):
            share = _share(windows, run.steps, (begin, end), node_of_ep, nodes_of_dp)
            rows.append({"concurrency": point.concurrency, "share": share})
    if not rows:
        raise ValueError("no recorder window overlaps a load point")
    return pd.DataFrame(rows)


def topology(run: Run) -> tuple[NDArray[np.int64], dict[int, list[int]]]:
    """Node of each EP rank, and the nodes of the ranks of each DP rank, from plan.json.

    Raises:
        ValueError: the plan does not say, or an EP rank spans nodes.
    """
    ranks = list(_ranks(run.plan))
    if not ranks or not all({"ep_rank", "dp_rank", "node"} <= rank.keys() for rank in ranks):
        raise ValueError("plan.json does not say which node each rank is on")
    by_ep: dict[int, set[int]] = {}
    by_dp: dict[int, list[int]] = {}
    for rank in ranks:
        by_ep.setdefault(int(rank["ep_rank"]), set()).add(int(rank["node"]))
        by_dp.setdefault(int(rank["dp_rank"]), []).append(int(rank["node"]))
    if any(len(nodes) > 1 for nodes in by_ep.values()):
        raise ValueError("copies of one EP rank are on several nodes: which one a token goes to is not recorded")
    if sorted(by_ep) != list(range(len(by_ep))) or (run.experts and run.experts.ep_size != len(by_ep)):
        raise ValueError("plan.json and experts.npz do not agree on the EP ranks")
    return np.array([min(by_ep[rank]) for rank in sorted(by_ep)]), by_dp


def _share(
    windows: WindowLoads,
    steps: pd.DataFrame,
    between: tuple[float, float],
    node_of_ep: NDArray[np.int64],
    nodes_of_dp: dict[int, list[int]],
) -> float:
    count = max(int(node_of_ep.max()), *(max(nodes) for nodes in nodes_of_dp.values())) + 1
    loads_N = np.zeros(count)
    np.add.at(loads_N, node_of_ep, windows.loads_WLG.sum((0, 1)))
    inside = steps[(steps["t_begin"] >= between[0]) & (steps["t_begin"] <= between[1])]
    tokens = inside.groupby("dp_rank")["tokens"].sum()
    sources_N = np.zeros(count)
    for dp_rank, nodes in nodes_of_dp.items():
        own = float(tokens.get(dp_rank, 0.0)) if len(tokens) else 1.0  # without steps: the same on every DP rank
        for node in nodes:
            sources_N[node] += own / len(nodes)
    return cross_node_share(loads_N, sources_N)


def _ranks(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the worker whose expert counts the run has: the one there is, or the first that decodes."""
    workers = plan.get("workers")
    found = [worker for worker in workers if isinstance(worker, dict)] if isinstance(workers, list) else []
    if any("pool" in worker for worker in found):
        found = [worker for worker in found if worker.get("pool") != "prefill"][:1]
    for worker in found:
        yield from (rank for rank in worker.get("ranks") or [] if isinstance(rank, dict))
