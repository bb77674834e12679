"""Inside an allocation: plans a deployment as the toolkit does and starts a trivial process in place of each of its.

``python -m tests.slurm.trivial RUN_DIR`` reads the folder's config.yaml, starts everything, waits until all run, writes
``where.json`` (process -> host and address), and ends everything.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from toolkit.launch.attempts import read_config
from toolkit.launch.launcher import ProcessSpec
from toolkit.launch.plan import num_ports, plan, pools
from toolkit.launch.slurm import SlurmLauncher

SLEEP = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)"


def main() -> None:
    run_dir = Path(sys.argv[1])
    cfg = read_config(run_dir)
    launcher = SlurmLauncher.of(cfg)
    nodes = launcher.nodes(pools(cfg), num_ports(cfg), run_dir)
    deployment = plan(cfg, [node.port for node in nodes])
    command = (sys.executable, "-c", SLEEP)
    specs = [
        ProcessSpec("rank", rank.rank, command, node=rank.node, group=f"worker-{worker.index}", grace_s=1.0)
        for worker in deployment.workers
        for rank in worker.ranks
    ]
    specs.append(ProcessSpec("frontend", 0, command, node=deployment.frontend.node, grace_s=1.0))
    begin = time.monotonic()
    job = launcher.start(specs, run_dir, {})
    try:
        logs = [run_dir / spec.log for spec in specs]
        while not all(log.exists() and log.stat().st_size for log in logs):
            assert all(state.alive for state in job.poll()), job.poll()
            assert time.monotonic() - begin < 120, "not all processes run within two minutes"
            time.sleep(0.2)
        where = {state.name: state.host for state in job.poll()}
        ready = time.monotonic() - begin
    finally:
        job.stop(5.0)
        launcher.close()
    ends = {state.name: state.returncode for state in job.poll()}
    planned = {rank.rank: rank.node for rank in deployment.ranks()}
    ports = [f"{nodes[node].host}:{port}" for node, port in deployment.ports()]
    result = {"where": where, "ends": ends, "planned": planned, "ports": ports, "ready_s": ready}
    (run_dir / "where.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
