"""Submit to charts on a real Slurm; what ends a run and what it leaves. The part that CI runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.runs import SHORT, Run
from toolkit.records.requests import read_requests


def test_dep8_on_four_nodes_from_submit_to_charts(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "parallel=dep8", "cluster.gpus_per_node=2", *SHORT)
    code, output = run.end()
    assert code == 0, output + run.story()
    assert f"Submitted job {run.job.job_id}" in output
    assert "RUNNING on node[1-4]" in output
    assert f"Report:     {run.folder}/report.html" in output
    status = run.status()
    assert (status.state, [p.state for p in status.points]) == ("done", ["done", "done"])
    rows = read_requests(run.folder)
    assert set(rows.status) == {"ok"}
    assert (run.folder / "charts/latency_vs_concurrency.png").exists()
    hosts = {json.loads(p.read_text())["host"] for p in (run.folder / "launch").glob("rank-*.json")}
    assert hosts == {"node1", "node2", "node3", "node4"}
    plan = json.loads((run.folder / "plan.json").read_text())
    assert [rank["node"] for rank in plan["workers"][0]["ranks"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all((run.folder / f"logs/rank-{i}.log").stat().st_size for i in range(8))
