"""The load phase: ``python -m toolkit.loadgen`` as one more process of the launcher, its progress shown here.

Knows the load generator's command line and progress file; what it measures is its own affair.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import to_mapping
from toolkit.engine.args import TOKEN_ENV
from toolkit.launch.attempts import deployment_key
from toolkit.launch.interrupts import Interrupts
from toolkit.launch.launcher import STATE_DIR, Launcher, Node, ProcessSpec, ProcessState, with_environment
from toolkit.launch.plan import DeploymentPlan
from toolkit.launch.watch import RunFailed, Watch, describe
from toolkit.records.status import RunStatus, read_status

if TYPE_CHECKING:
    from toolkit.loadgen.progress import ProgressBars

POLL_S = 0.25
SERVER_GONE, SERVER_GONE_S = 4, 10.0  # its exit code when the server is gone; somebody's death is then to be reported
PROGRESS = "progress.json"  # inside STATE_DIR
GRACE_S = 20.0  # to write down what was measured


class LoadFailed(RunFailed):
    """The load generator, or a load point, failed; the deployment lives."""


def processes(
    cfg: ExpConfig, plan: DeploymentPlan, nodes: Sequence[Node], run_dir: Path, attempt: int = 1
) -> list[ProcessSpec]:
    """The load generator: one process, or one on each of several nodes, the first of which leads."""
    meet = f"{nodes[plan.loadgen.nodes[0]].host}:{plan.loadgen.port}" if len(plan.loadgen.nodes) > 1 else ""
    lead = command(cfg, plan, nodes, run_dir, meet, attempt)
    join = (sys.executable, "-m", "toolkit.loadgen", "join", meet)
    env = {"no_proxy": "*", "NO_PROXY": "*"}  # a proxy of the site is not for what is on the cluster's own network
    return [
        ProcessSpec("loadgen", i, join if i else tuple(lead), env, node, grace_s=GRACE_S)
        for i, node in enumerate(plan.loadgen.nodes)
    ]


def command(
    cfg: ExpConfig, plan: DeploymentPlan, nodes: Sequence[Node], run_dir: Path, meet: str, attempt: int = 1
) -> list[str]:
    """The leader's command line: every ``load.*`` key as ``key=<JSON>``."""
    host = nodes[plan.frontend.node].host if meet else plan.frontend.client_host
    target = {
        "url": f"http://{host}:{plan.frontend.http_port}",
        "model": cfg.model.name,
        "tokenizer": cfg.model.tokenizer,
        "out": str(run_dir),
        "num_gpus": str(plan.num_gpus),
        "progress": str(run_dir / STATE_DIR / PROGRESS),
        "resume": "true",  # what the folder holds is of this run: attempts.py has seen to that
        "attempt": str(attempt),
        "deployment": deployment_key(cfg),
    }
    if meet:
        target["listen"] = meet
    if cfg.deploy.api_key_env:
        target["api_key_env"] = cfg.deploy.api_key_env
    load = {key: json.dumps(value) for key, value in to_mapping(cfg.load).items()}
    words = [f"{key}={value}" for key, value in (target | load).items()]
    return [sys.executable, "-m", "toolkit.loadgen", *words]


def run_load(
    cfg: ExpConfig,
    plan: DeploymentPlan,
    nodes: Sequence[Node],
    run_dir: Path,
    launcher: Launcher,
    watch: Watch,
    interrupts: Interrupts,
    attempt: int = 1,
) -> None:
    """Runs the sweep to its end.

    Raises:
        LoadFailed: the load generator failed, or a load point did.
        RunFailed: a process of the deployment ended. The load generator is then ended too, after it had time to write
            what it has.
    """
    from toolkit.loadgen.progress import ProgressBars

    progress = run_dir / STATE_DIR / PROGRESS
    specs = with_environment(processes(cfg, plan, nodes, run_dir, attempt), cfg, nodes)
    job = None
    try:
        with interrupts.held():
            job = launcher.start(specs, run_dir, {TOKEN_ENV: secrets.token_hex(16)})
        with ProgressBars() as bars:
            while (state := job.poll()[0]).alive:
                watch.check_steps()
                if not watch.all_alive():
                    job.stop(GRACE_S)  # what it sends from now on can only fail
                    watch.check()
                _show(progress, bars)
                time.sleep(POLL_S)
            _show(progress, bars)
        if state.returncode != 0:  # a process whose death is the reason may not have been reported yet
            watch.wait_for_death(SERVER_GONE_S if state.returncode == SERVER_GONE else POLL_S)
        watch.check()
        if state.returncode != 0:
            raise LoadFailed(_reason(run_dir, state), run_dir / specs[0].log)
    finally:
        with interrupts.ignored():
            if job is not None:
                job.stop(GRACE_S)


def _show(progress: Path, bars: ProgressBars) -> None:
    state = read_progress(progress)
    if state is not None:
        bars.update(state)


def _reason(run_dir: Path, state: ProcessState) -> str:
    """Why the load generator failed: its own words, which it leaves in status.json, or else its exit code."""
    try:
        status = read_status(run_dir)
    except (OSError, msgspec.DecodeError):
        status = RunStatus()
    return status.reason or describe(dataclasses.replace(state, name="the load generator"))


def read_progress(progress: Path) -> dict[str, Any] | None:
    """The load generator's last word; None before its first."""
    try:
        state = json.loads(progress.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if isinstance(state, dict) else None
