"""A deployment: the processes of one plan, from before their nodes are known until all of them are gone.

Most serve one run and write into its folder. A deployment whose next run has the same one stays up
(``standing.py``); it then has a folder of its own in that of its first run, and each run gets its part of what lies
there (``share.py``). Knows in which order a deployment comes up and goes down, and nothing of loads.
Read next: ``launcher.py``, ``health.py``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit import records
from toolkit.config.experiment import ExpConfig
from toolkit.engine.args import TOKEN_ENV
from toolkit.heartbeat import beating
from toolkit.launch import attempts, sampler
from toolkit.launch.adapters import Processes, adapters
from toolkit.launch.health import LoadingBars, ask, http, wait_ready
from toolkit.launch.interrupts import Interrupts
from toolkit.launch.launcher import STATE_DIR, Job, Launcher, Node, launchers, with_environment
from toolkit.launch.plan import DeploymentPlan, num_ports, plan, pools
from toolkit.launch.preflight import preflight
from toolkit.launch.restarts import RestartingJob
from toolkit.launch.share import FOLDER, Share
from toolkit.launch.show import say
from toolkit.launch.stall import StallWatch
from toolkit.launch.watch import RunFailed, Watch, lost
from toolkit.records.files import write_json

log = logging.getLogger(__name__)

STOP_GRACE_S = 10.0
DRAIN_S = 10.0  # for what the last load has given up to leave the ranks
REPORT_S = 5.0  # for a process that was started to say where it runs


class Deployment:
    """The processes of ``cfg``.

    Args:
        run_dir: of its first run.
        shared: other runs may come; its processes then write into a folder of their own.
    """

    def __init__(self, cfg: ExpConfig, run_dir: Path, shared: bool) -> None:
        self.cfg, self.home = cfg, run_dir / FOLDER if shared else run_dir
        self.launcher: Launcher = launchers()[cfg.cluster.launcher](cfg)
        self.nodes: list[Node] = []
        self.loads = 0  # that it has served or serves
        self._share = Share(self.home) if shared else None
        self._alive = contextlib.ExitStack()
        self._files: list[str] = []
        self._job: Job | None = None
        self._watch: Watch | None = None
        self._stall: StallWatch | None = None
        self._url, self._ready_at = "", 0.0

    @property
    def watch(self) -> Watch:
        assert self._watch is not None, "start() comes first"
        return self._watch

    def plan(self, cfg: ExpConfig) -> DeploymentPlan:
        """The plan of ``cfg``, whose deployment is this one, on the nodes that it has."""
        return plan(cfg, [node.port for node in self.nodes])

    def start(self, run_dir: Path, interrupts: Interrupts, console: Console) -> None:
        """Returns when every rank is ready; ``run_dir`` is the first run's folder.

        Raises:
            RunFailed: it did not come up. ``stop`` is then the caller's to call, as it always is.
        """
        cfg = self.cfg
        self.nodes = self.launcher.nodes(pools(cfg), num_ports(cfg), run_dir)
        attempts.note(run_dir, hosts=[node.host for node in self.nodes])
        deployment = self.plan(cfg)
        write_json(run_dir / records.PLAN, deployment.to_json())
        processes = self._write_files(deployment)
        if cfg.health.preflight:
            for text in preflight(cfg, deployment, self.nodes, run_dir, self.launcher):
                log.warning("preflight: %s", text)
        self._url = f"http://{deployment.frontend.client_host}:{deployment.frontend.http_port}"
        count = f"Starting {len(processes.specs)} processes"
        say(console, f"{count}: {deployment.mapping}, frontend at {self._url}")
        specs = [*processes.specs, *sampler.specs(cfg, deployment.num_nodes, self.home)]
        if self._share is not None:
            self._alive.enter_context(beating(self.home))  # the run's own heart stops when its load is over
        with interrupts.held():
            token = {TOKEN_ENV: secrets.token_hex(16)}
            first = self.launcher.start(with_environment(specs, cfg, self.nodes), self.home, token)
            limit = cfg.deploy.restart_workers if cfg.deploy.mode == "disagg" else 0
            job = self._job = RestartingJob(first, self.launcher, self.home, token, limit)
        self._lend(run_dir)
        self._stall = StallWatch(self._job.specs, self.home, cfg.health.stall_s)
        self._watch = Watch(self._job, self.home, self._stall)
        with LoadingBars(console, deployment.num_gpus) as bars:
            wait_ready(self._url, self._watch, cfg.health.stall_s, bars)
        job.arm()
        self._ready_at = time.time()

    def _write_files(self, deployment: DeploymentPlan) -> Processes:
        for name in (STATE_DIR, records.LOGS):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        hosts = [node.host for node in self.nodes]
        processes = adapters()[self.cfg.engine.backend](deployment, self.cfg, hosts, self.home)
        for name, content in processes.files.items():
            (self.home / name).write_bytes(content)
        self._files = list(processes.files)
        return processes

    def explained(self, error: RunFailed) -> RunFailed:
        """``error``, with the node that is lost, if one is: its ranks' peers fail first, and say nothing of it."""
        silent = self.launcher.silent()
        return RunFailed(lost(silent, str(error)), error.log, error.log_tail) if silent else error

    def serve(self, run_dir: Path) -> None:
        """The folder of the run that is loaded now has what its processes leave; its manifest says which they are."""
        assert self._job is not None, "start() comes first"
        if self.loads:
            self._lend(run_dir)
        facts = {
            "folder": str(self.home),
            "ready": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._ready_at)),
            "loads_before": self.loads,
            "processes": self._places(),
        }
        attempts.note(run_dir, hosts=[node.host for node in self.nodes], deployment=facts)
        self.loads += 1

    def _places(self) -> dict[str, list[str | int]]:
        """Host and pid of each process. One that has yet to report, as a sampler may when all ranks are ready, gets a
        few seconds."""
        assert self._job is not None, "start() comes first"
        deadline = time.monotonic() + REPORT_S
        states = self._job.poll()
        while any(state.state == "starting" for state in states) and time.monotonic() < deadline:
            time.sleep(0.05)
            states = self._job.poll()
        return {state.name: [state.host, state.pid] for state in states}

    def _lend(self, run_dir: Path) -> None:
        if self._share is not None and self._job is not None:
            self._share.lend(run_dir, self._job.specs, self._files)

    def settle(self, run_dir: Path) -> None:
        """After the run's load: what lies in the deployment's folder and is of this run goes into the run's."""
        if self._share is None or self._job is None:
            return
        if self.loads and self.watch.all_alive():
            self.post("/flush_cache")  # writes rows of steps, too
        self._share.settle(run_dir, self._job.specs, self._files)

    def fresh(self) -> bool:
        """Whether it is as good as a new one: every rank answers, holds no request, and has forgotten all prompts."""
        if self._stall is None or not self.watch.all_alive():
            return False
        deadline = time.monotonic() + DRAIN_S
        while self._stall.requests() and time.monotonic() < deadline:
            time.sleep(0.2)
        flushed = self.post("/flush_cache") == ""
        return flushed and not self._stall.requests() and ask(self._url)[0]

    def collect_experts(self) -> None:
        """Has rank 0 write experts.npz, and dump this run's windows. A lack is a gap in the report, no failure."""
        if self.cfg.engine.expert_distribution_recorder_mode is None or not self.watch.all_alive():
            return
        since = self._share.since if self._share is not None else 0.0
        error = self.post("/dump_expert_distribution_record", {"since": since})
        if error or not (self.home / records.EXPERTS).exists():
            log.warning("no %s: %s", records.EXPERTS, error or "the first rank has written none")

    def post(self, path: str, body: Any = None) -> str:
        """Asks the frontend for ``path``; what was wrong, or empty."""
        cfg = self.cfg
        key = os.environ.get(cfg.deploy.api_key_env, "") if cfg.deploy.api_key_env else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            status, answer = http(f"{self._url}{path}", body or {}, headers)
        except OSError as error:
            return f"the frontend did not answer: {error}"
        return "" if status == 200 else f"HTTP {status} {answer[:500].decode(errors='replace')}"

    def stop(self) -> None:
        """Ends every process and gives nodes and ports back. May be called again."""
        if self._job is not None:
            self._job.stop(STOP_GRACE_S)
        self.launcher.close()
        self._alive.close()

    def close(self) -> None:
        """``stop``, and no run will come any more."""
        self.stop()
        if self._share is not None:
            self._share.over()
