"""LocalLauncher: every process on this machine, through submitit's local executor.

The same road as on Slurm: submitit starts one task a process, each task runs ``rank.py``. Submitit's own files
lie in the run folder's ``launch/``; they hold the specs, never a secret: secrets are in the environment only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from toolkit.config.experiment import ExpConfig
from toolkit.launch import child, ports
from toolkit.launch.launcher import GRACE_S, STATE_DIR, Node, ProcessSpec, ProcessState, read_state
from toolkit.launch.plan import PoolPlan
from toolkit.launch.rank import Task

FOREVER_MIN = 60 * 24 * 365  # submitit wants a time limit; locally the launcher's presence is the limit


class LocalJob:
    """Processes under one submitit controller."""

    def __init__(self, specs: Sequence[ProcessSpec], run_dir: Path, controller: Any) -> None:
        self.specs = tuple(specs)
        self._run_dir = run_dir
        self._controller = controller  # submitit.LocalJob; its job_id is the controller's pid

    def poll(self) -> list[ProcessState]:
        over = self._controller.done()  # asked before the files are read: what they say then is final
        states = [read_state(spec, self._run_dir) for spec in self.specs]
        return [ProcessState(s.name, "lost", s.returncode, s.host, s.pid) if over and s.alive else s for s in states]

    def stop(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM to every task, through the controller; what outlives ``grace_s`` is killed."""
        if not self._controller.done():
            os.kill(int(self._controller.job_id), signal.SIGTERM)
        deadline = time.monotonic() + grace_s + 5.0
        while not self._controller.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._kill_rest()

    def _kill_rest(self) -> None:
        """For a controller or a task that was itself killed, or hangs. Normally finds nothing."""
        controller = int(self._controller.job_id)
        if not self._controller.done():
            with contextlib.suppress(psutil.NoSuchProcess):
                for task in psutil.Process(controller).children():
                    task.kill()
                psutil.Process(controller).kill()
            while not self._controller.done():
                time.sleep(0.05)
        for spec in self.specs:
            state = read_state(spec, self._run_dir)
            if state.state == "running" and child.find(state.pid, state.create_time):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(state.pid, signal.SIGKILL)


class LocalLauncher:
    def __init__(self, port: int = 0) -> None:
        self._port = port  # 0: any
        self._claim: ports.Claim | None = None

    @classmethod
    def of(cls, cfg: ExpConfig) -> LocalLauncher:
        return cls(cfg.cluster.port)

    def nodes(self, pools: Sequence[PoolPlan], num_ports: int, run_dir: Path) -> list[Node]:
        assert [pool.num_nodes for pool in pools] == [1], f"a local deployment has one node, not {pools}"
        self.close()
        self._claim = None if self._port else ports.claim(num_ports)
        return [Node("127.0.0.1", self._claim.first if self._claim else self._port)]

    def silent(self) -> list[str]:
        return []

    def close(self) -> None:
        if self._claim:
            self._claim.close()

    def start(self, specs: Sequence[ProcessSpec], run_dir: Path, secrets: Mapping[str, str]) -> LocalJob:
        import submitit

        logging.getLogger("submitit").setLevel(logging.WARNING)
        me = psutil.Process()
        task = Task(
            specs=tuple(specs),
            run_dir=run_dir.absolute(),
            launcher=(me.pid, me.create_time()),
            visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
        executor = submitit.LocalExecutor(folder=run_dir.absolute() / STATE_DIR / "submitit")
        executor.update_parameters(tasks_per_node=len(specs), timeout_min=FOREVER_MIN)
        with _environment(secrets), _no_interrupt():
            controller = executor.submit(task)
        return LocalJob(specs, run_dir, controller)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Puts ``values`` into this process's environment for the time in which it starts others."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which the terminal sends to all: the launcher ends them in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
