"""A deployment whose processes a test kills, freezes and starts again, one by one; nothing watches over them."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import requests

from tests.e2e.serving import tiny_model
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping
from toolkit.config.resolve import resolve
from toolkit.engine.args import TOKEN_ENV
from toolkit.launch import ports
from toolkit.launch.adapters import adapters
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.plan import num_ports, plan


class Processes:
    """All processes of a local deployment by name: ``prefill0-0``, ``frontend-0``.

    Args:
        wrap: put before a process's command, by its name: the way into another network.
    """

    def __init__(self, cfg: ExpConfig, run_dir: Path, hosts: list[str], wrap: dict[str, list[str]]) -> None:
        self._claim = ports.claim(num_ports(cfg))
        deployment = plan(cfg, self._claim.first)
        (run_dir / STATE_DIR).mkdir(parents=True)
        (run_dir / "logs").mkdir()
        processes = adapters()["native"](deployment, cfg, hosts, run_dir)
        for name, content in processes.files.items():
            (run_dir / name).write_bytes(content)
        self.cfg, self.run_dir, self._wrap = cfg, run_dir, wrap
        self.url = f"http://{deployment.frontend.client_host}:{deployment.frontend.http_port}"
        self._specs = {spec.name: spec for spec in processes.specs}
        self._token = secrets.token_hex(16)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []

    @property
    def names(self) -> list[str]:
        return list(self._specs)

    def start(self, name: str) -> None:
        spec = self._specs[name]
        log = (self.run_dir / spec.log).open("ab")
        self._logs.append(log)
        env = {**os.environ, **spec.env, TOKEN_ENV: self._token}
        command = [*self._wrap.get(name, []), *spec.argv]
        self._running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def kill(self, name: str) -> None:
        self._signal(name, signal.SIGKILL)
        self._running.pop(name).wait()

    def freeze(self, name: str) -> None:
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> None:
        os.killpg(self._running[name].pid, number)

    def stop(self) -> None:
        for name in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                self.thaw(name)
                self.kill(name)
        for log in self._logs:
            log.close()
        self._claim.close()

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{self.url}/get_server_info", timeout=10).json()
        return found

    def wait_until(self, condition: Any, what: str, limit_s: float = 180.0) -> None:
        """``condition`` of the server's info; what is not there yet counts as no."""
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if condition(self.info()):
                    return
            dead = [name for name, process in self._running.items() if process.poll() is not None]
            assert not dead, f"{dead[0]} has ended: {(self.run_dir / self._specs[dead[0]].log).read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{what} has not come about: {self.info()}"
            time.sleep(0.1)


@contextlib.contextmanager
def processes(
    run_dir: Path, hosts: list[str] | None = None, wrap: dict[str, list[str]] | None = None, **groups: Any
) -> Iterator[Processes]:
    """A ready deployment of ``groups`` of the config, the tiny model unless they say otherwise."""
    cfg = resolve(from_mapping({"model": tiny_model()} | groups, ExpConfig))
    found = Processes(cfg, run_dir, hosts or ["127.0.0.1"], wrap or {})
    try:
        for name in found.names:
            found.start(name)
        found.wait_until(lambda info: info["state"] == "ready", "readiness")
        yield found
    finally:
        found.stop()
