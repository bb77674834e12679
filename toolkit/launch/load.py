"""The load phase: ``python -m toolkit.loadgen`` as a process beside the deployment, its progress shown here.

Knows the load generator's command line and progress file; what it measures is its own affair.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit import records
from toolkit.config import ExpConfig, to_mapping
from toolkit.launch import child
from toolkit.launch.attempts import deployment_key
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.plan import DeploymentPlan
from toolkit.launch.watch import RunFailed, Watch, exit_text

if TYPE_CHECKING:
    from toolkit.loadgen.progress import ProgressBars

POLL_S = 0.25
SERVER_GONE, SERVER_GONE_S = 4, 10.0  # its exit code when the server is gone; somebody's death is then to be reported
GRACE_S = 20.0  # to write down what was measured


def command(cfg: ExpConfig, plan: DeploymentPlan, run_dir: Path, attempt: int = 1) -> list[str]:
    """The load generator's command line: every ``load.*`` key as ``key=<JSON>``."""
    target = {
        "url": f"http://{plan.frontend.client_host}:{plan.frontend.http_port}",
        "model": cfg.model.name,
        "tokenizer": cfg.model.tokenizer,
        "out": str(run_dir),
        "num_gpus": str(plan.num_gpus),
        "progress": str(run_dir / STATE_DIR / "progress.json"),
        "resume": "true",  # what the folder holds is of this run: attempts.py has seen to that
        "attempt": str(attempt),
        "deployment": deployment_key(cfg),
    }
    if cfg.deploy.api_key_env:
        target["api_key_env"] = cfg.deploy.api_key_env
    load = {key: json.dumps(value) for key, value in to_mapping(cfg.load).items()}
    words = [f"{key}={value}" for key, value in (target | load).items()]
    return [sys.executable, "-m", "toolkit.loadgen", *words]


def run_load(cfg: ExpConfig, plan: DeploymentPlan, run_dir: Path, watch: Watch, attempt: int) -> None:
    """Runs the sweep to its end.

    Raises:
        RunFailed: the load generator failed, or a process of the deployment ended. The load generator is then
            ended too, after it had time to write what it has.
    """
    from toolkit.loadgen.progress import ProgressBars

    log, progress = run_dir / records.log_name("loadgen", 0), run_dir / STATE_DIR / "progress.json"
    process = child.start(command(cfg, plan, run_dir, attempt), log)
    try:
        with ProgressBars() as bars:
            while (code := process.poll()) is None:
                watch.check_steps()
                if not watch.all_alive():
                    process.terminate()  # what it sends from now on can only fail
                    watch.check()
                _show(progress, bars)
                time.sleep(POLL_S)
            _show(progress, bars)
        if code != 0:  # a process whose death is the reason may not have been reported yet
            watch.wait_for_death(SERVER_GONE_S if code == SERVER_GONE else POLL_S)
        watch.check()
        if code != 0:
            raise RunFailed(_reason(run_dir, code), log)
    finally:
        child.end(process, GRACE_S)


def _show(progress: Path, bars: ProgressBars) -> None:
    state = read_progress(progress)
    if state is not None:
        bars.update(state)


def _reason(run_dir: Path, code: int) -> str:
    """Why the load generator failed: its own words in status.json, which it keeps, or else its exit code."""
    try:
        status = records.read_status(run_dir)
    except (OSError, msgspec.DecodeError):
        status = records.RunStatus()
    return status.reason or exit_text("the load generator", code)


def read_progress(progress: Path) -> dict[str, Any] | None:
    """The load generator's last word; None before its first."""
    try:
        state = json.loads(progress.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if isinstance(state, dict) else None
