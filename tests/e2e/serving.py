"""Real engine ranks and a frontend on this machine, started as the launcher starts them, with the tiny model."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping
from toolkit.config.resolve import resolve
from toolkit.engine.args import TOKEN_ENV
from toolkit.launch import ports
from toolkit.launch.adapters import adapters
from toolkit.launch.health import LoadingBars, wait_ready
from toolkit.launch.launcher import STATE_DIR, Job
from toolkit.launch.local import LocalLauncher
from toolkit.launch.plan import num_ports, plan
from toolkit.launch.watch import Watch

CONF = Path(__file__).parents[2] / "conf"


def tiny_model() -> dict[str, Any]:
    values = yaml.safe_load((CONF / "model" / "tiny.yaml").read_text())
    values.pop("defaults")
    return values


@dataclass
class Served:
    url: str
    cfg: ExpConfig
    job: Job
    run_dir: Path


@contextlib.contextmanager
def serve(run_dir: Path, **groups: dict[str, Any]) -> Iterator[Served]:
    """A ready server for ``groups`` of the config (the tiny model unless they say otherwise)."""
    cfg = resolve(from_mapping({"model": tiny_model()} | groups, ExpConfig))
    with contextlib.closing(ports.claim(num_ports(cfg))) as claim:
        yield from _serve(run_dir, cfg, claim.first)


def _serve(run_dir: Path, cfg: ExpConfig, port: int) -> Iterator[Served]:
    deployment = plan(cfg, port)
    (run_dir / STATE_DIR).mkdir(parents=True)
    (run_dir / "logs").mkdir()
    processes = adapters()["native"](deployment, cfg, ["127.0.0.1"], run_dir)
    for name, content in processes.files.items():
        (run_dir / name).write_bytes(content)
    specs = [dataclasses.replace(spec, grace_s=3.0) for spec in processes.specs]
    job = LocalLauncher().start(specs, run_dir, {TOKEN_ENV: secrets.token_hex(16)})
    try:
        url = f"http://127.0.0.1:{deployment.frontend.http_port}"
        with LoadingBars(Console(), deployment.num_gpus) as bars:
            wait_ready(url, Watch(job, run_dir), 240, bars)
        yield Served(url, cfg, job, run_dir)
    finally:
        job.stop(3)
