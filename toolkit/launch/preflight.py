"""A look at every node before ranks start: what would cost an hour to find out by a hang is known in seconds.

A job step of its own: one process a node, ``python -m toolkit.launch.preflight --ask FILE --node I``, looks at its
machine (``node_checks.py``) and leaves a report in the run folder; the launcher waits for all of them, compares nodes
with each other, and names each bad one with every reason. ``BadNodes`` says which, so that whoever submitted the job
can leave them out (``cluster.exclude_bad_nodes``). Owns the conversation and the verdict.
Read next: ``node_checks.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from toolkit.config.experiment import ExpConfig
from toolkit.launch.launcher import STATE_DIR, Job, Launcher, Node, ProcessSpec, ProcessState, tail
from toolkit.launch.node_checks import FIRST_WORD, Ask, Report, look
from toolkit.launch.plan import DeploymentPlan
from toolkit.launch.pools import worker_pools
from toolkit.launch.watch import RunFailed, describe
from toolkit.records.files import write_json

FOLDER = "preflight"  # inside STATE_DIR
ASK, BAD = "ask.json", "bad.json"
PATIENCE_S = 120.0  # for all reports; a file system that hangs is a finding too
WAIT_S = 30.0  # of a node for the first one
LAG_S = 30.0  # for a report of a process that has ended well: a network file system may show it late
GRACE_S = 2.0
NODES_FILE = "nodes.json"  # of the run folder: every node's hardware, as it reported it


class BadNode(msgspec.Struct, frozen=True):
    """A node that ranks must not be started on: its index in the launcher's nodes, the cluster's name for it, why."""

    node: int
    host: str
    reasons: list[str]


class BadNodes(RunFailed):
    """The run must not begin. ``nodes`` says where and why; bad.json in ``FOLDER`` says it to other processes."""

    def __init__(self, nodes: Sequence[BadNode]) -> None:
        self.nodes = list(nodes)
        told = "; ".join(f"{bad.host}: {', '.join(bad.reasons)}" for bad in nodes)
        super().__init__(f"preflight: {len(nodes)} bad node{'s' if len(nodes) > 1 else ''}: {told}")


def bad_nodes(run_dir: Path, found: Sequence[BadNode]) -> BadNodes:
    """The error to raise for ``found``; they are in bad.json then."""
    folder = run_dir / STATE_DIR / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BAD, msgspec.to_builtins(list(found)))
    return BadNodes(found)


def read_bad(run_dir: Path) -> list[BadNode]:
    """The bad nodes that the last preflight of a run found; empty where all were good, or none was made."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((run_dir / STATE_DIR / FOLDER / BAD).read_bytes(), type=list[BadNode])
    return []


def preflight(
    cfg: ExpConfig, plan: DeploymentPlan, nodes: Sequence[Node], run_dir: Path, launcher: Launcher
) -> list[str]:
    """Looks at every node of ``plan``; returns what is worth knowing and no reason to stop.

    Raises:
        BadNodes: and says which; also when a node does not report at all.
    """
    folder = run_dir / STATE_DIR / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("node-*.json"), folder / BAD, folder / FIRST_WORD):
        old.unlink(missing_ok=True)
    ask = ask_of(cfg, plan, nodes, run_dir)
    (folder / ASK).write_bytes(msgspec.json.encode(ask))
    job = launcher.start(specs(plan.num_nodes, run_dir), run_dir, {})
    try:
        reports = _wait(job, folder, run_dir)
    finally:
        job.stop(GRACE_S)
    names = {i: node.name or (i in reports and reports[i].host) or node.host for i, node in enumerate(nodes)}
    own = {i: report for i, report in reports.items() if report.host}
    bad = {i: [*report.problems, *(compare(i, own) if i in own else [])] for i, report in reports.items()}
    if 0 in own:  # else nobody told the others the time: that is no fault of theirs
        bad |= {i: [f"no report within {PATIENCE_S:g} s"] for i in range(len(nodes)) if i not in reports}
    write_json(run_dir / NODES_FILE, [msgspec.to_builtins(report) for _, report in sorted(own.items())])
    found = [BadNode(i, names[i], reasons) for i, reasons in sorted(bad.items()) if reasons]
    if found:
        raise bad_nodes(run_dir, found)
    return [f"{names[i]}: {text}" for i, report in sorted(own.items()) for text in report.warnings]


def forget(run_dir: Path) -> None:
    """What an earlier life of the run found is of no matter to the next one."""
    (run_dir / STATE_DIR / FOLDER / BAD).unlink(missing_ok=True)


def specs(num_nodes: int, run_dir: Path) -> list[ProcessSpec]:
    ask = str(run_dir / STATE_DIR / FOLDER / ASK)
    command = (sys.executable, "-m", "toolkit.launch.preflight", "--ask", ask, "--node")
    env = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return [
        ProcessSpec("preflight", node, (*command, str(node)), env, node, group="preflight", grace_s=GRACE_S)
        for node in range(num_nodes)
    ]


def ask_of(cfg: ExpConfig, plan: DeploymentPlan, nodes: Sequence[Node], run_dir: Path) -> Ask:
    """What every node is asked; ports and ranks by node."""
    from toolkit.launch.check_model import memory

    ranks = Counter(rank.node for rank in plan.ranks())
    ports: dict[int, list[int]] = {node: [] for node in range(plan.num_nodes)}
    ports[plan.frontend.node].append(plan.frontend.http_port)
    for worker in plan.workers:
        ports[plan.frontend.node].append(worker.inbox_port)
        ports[worker.ranks[0].node].append(worker.dist_port)
        for rank in worker.ranks:
            ports[rank.node].append(rank.inbox_port)
    return Ask(
        run_dir=str(run_dir),
        device=cfg.cluster.device,
        ranks=[ranks[node] for node in range(plan.num_nodes)],
        rank_bytes=max(sum(memory(pool.view(cfg)).values()) for pool in worker_pools(cfg)),
        hosts=[node.host for node in nodes],
        ports=[ports[node] for node in range(plan.num_nodes)],
        clock_port=plan.frontend.http_port if plan.frontend.node == 0 else ports[0][0],
        min_disk_bytes=int(cfg.health.min_disk_gb * 1e9),
        wait_s=WAIT_S,
        max_clock_offset_s=cfg.health.max_clock_offset_ms / 1e3,
    )


def compare(node: int, reports: Mapping[int, Report]) -> list[str]:
    """What only shows beside other nodes: a driver or GPU model of ``node`` that differs from that of most."""
    found = []
    for what, values in (
        ("driver", {i: report.driver for i, report in reports.items()}),
        ("GPUs", {i: ", ".join(sorted(set(report.gpu_names))) for i, report in reports.items()}),
    ):
        usual, _ = Counter(values.values()).most_common(1)[0]
        if values[node] != usual:
            found.append(f"{what} {values[node] or 'none'}, the other nodes have {usual or 'none'}")
    return found


def _wait(job: Job, folder: Path, run_dir: Path) -> dict[int, Report]:
    """The reports by node, as they come; those that do not come in time are missing.

    One whose process is gone has no ``host`` and is written here: the first node waits for all, because they ask it the
    time. Nothing is waited for without the first node.
    """
    deadline = time.monotonic() + PATIENCE_S
    reports: dict[int, Report] = {}
    ended: dict[int, float] = {}
    while len(reports) < len(job.specs) and time.monotonic() < deadline:
        states = job.poll()  # asked before the files are read
        for spec, state in zip(job.specs, states, strict=True):
            if spec.index in reports:
                continue
            if not state.alive:
                ended.setdefault(spec.index, time.monotonic())
            if (report := read_report(folder, spec.index)) is not None:
                reports[spec.index] = report
            elif not state.alive and (state.returncode != 0 or time.monotonic() - ended[spec.index] > LAG_S):
                reports[spec.index] = Report(problems=[_gone(run_dir, spec, state)])
                write_json(folder / f"node-{spec.index}.json", msgspec.to_builtins(reports[spec.index]))
        if 0 in reports and not reports[0].host:
            return {0: reports[0]}
        time.sleep(0.1)
    if 0 not in reports:  # it hangs: what the others say of it is no fault of theirs
        return {0: Report(problems=[f"no report within {PATIENCE_S:g} s"])}
    return reports


def _gone(run_dir: Path, spec: ProcessSpec, state: ProcessState) -> str:
    last = [line.strip()[:200] for line in tail(run_dir / spec.log, 3) if line.strip()]
    return f"no report: {describe(state)}" + (f" ({last[-1]})" if last else "")


def read_report(folder: Path, node: int) -> Report | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((folder / f"node-{node}.json").read_bytes(), type=Report)
    return None


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.launch.preflight", description=__doc__)
    parser.add_argument("--ask", required=True, type=Path, help="JSON of what is asked (node_checks.Ask)")
    parser.add_argument("--node", required=True, type=int, help="which node of the deployment this is")
    options = parser.parse_args(words)
    ask = msgspec.json.decode(options.ask.read_bytes(), type=Ask)
    report = look(ask, options.node, options.ask.parent)
    write_json(options.ask.parent / f"node-{options.node}.json", msgspec.to_builtins(report))
    sys.stdout.write(f"{msgspec.json.encode(report).decode()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
