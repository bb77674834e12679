"""The engine of this project: one process a rank, one frontend; arguments in a JSON file each kind shares.

Knows ``engine/args.py`` and nothing else of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit import records
from toolkit.config import ExpConfig
from toolkit.engine.args import FrontendArgs, WorkerArgs
from toolkit.launch.adapters import Processes
from toolkit.launch.launcher import STATE_DIR, ProcessSpec
from toolkit.launch.plan import DeploymentPlan, WorkerPlan
from toolkit.launch.srun import engine_python

WORKER_ARGS = f"{STATE_DIR}/worker-args.json"
FRONTEND_ARGS = f"{STATE_DIR}/frontend-args.json"


def processes(plan: DeploymentPlan, cfg: ExpConfig, hosts: Sequence[str], run_dir: Path) -> Processes:
    """The ranks in order, then the frontend."""
    (worker,) = plan.workers
    env = _env(cfg, hosts)
    ranks = [
        ProcessSpec(
            role="rank",
            index=rank.rank,
            argv=(*_python(cfg, "toolkit.engine.worker"), str(run_dir / WORKER_ARGS), "--rank", str(rank.rank)),
            env=env,
            node=rank.node,
            group=f"worker-{worker.index}",
        )
        for rank in worker.ranks
    ]
    frontend = ProcessSpec(
        role="frontend",
        index=0,
        argv=(*_python(cfg, "toolkit.engine.frontend"), str(run_dir / FRONTEND_ARGS)),
        env=env,
        node=plan.frontend.node,
    )
    files = {
        WORKER_ARGS: _json(_worker_args(plan, worker, cfg, hosts, run_dir)),
        FRONTEND_ARGS: _json(_frontend_args(plan, worker, cfg, hosts)),
    }
    return Processes((*ranks, frontend), files)


def _python(cfg: ExpConfig, module: str) -> tuple[str, ...]:
    return (engine_python(cfg.cluster), "-m", module, "--args")


def _worker_args(
    plan: DeploymentPlan, worker: WorkerPlan, cfg: ExpConfig, hosts: Sequence[str], run_dir: Path
) -> WorkerArgs:
    return WorkerArgs(
        model=cfg.model,
        parallel=cfg.parallel,
        engine=cfg.engine,
        device=cfg.cluster.device,
        cpu_threads=cfg.cluster.cpu_threads_per_rank,
        rank_hosts=[hosts[rank.node] for rank in worker.ranks],
        inbox_ports=[rank.inbox_port for rank in worker.ranks],
        local_ranks=[rank.local_rank for rank in worker.ranks],
        dist_port=worker.dist_port,
        frontend=(hosts[plan.frontend.node], plan.frontend.inbox_port),
        experts_path=str(run_dir / records.EXPERTS),
        steps_dir=str(run_dir),
        profile_dir=str(run_dir / records.PROFILES),
    )


def _frontend_args(plan: DeploymentPlan, worker: WorkerPlan, cfg: ExpConfig, hosts: Sequence[str]) -> FrontendArgs:
    return FrontendArgs(
        model=cfg.model,
        parallel=cfg.parallel,
        engine=cfg.engine,
        http=(plan.frontend.host, plan.frontend.http_port),
        inbox=(hosts[plan.frontend.node], plan.frontend.inbox_port),
        rank_inboxes=[(hosts[rank.node], rank.inbox_port) for rank in worker.ranks],
        router=cfg.deploy.router,
        api_key_env=cfg.deploy.api_key_env,
    )


def _env(cfg: ExpConfig, hosts: Sequence[str]) -> dict[str, str]:
    threads = str(cfg.cluster.cpu_threads_per_rank)
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",  # logs are read while the process runs, and after it was killed
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # a model is a folder; nothing is fetched behind the user's back
    }
    if all(host == "127.0.0.1" for host in hosts):
        env["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise gloo resolves the host's name, which may not lead back here
    return env


def _json(args: WorkerArgs | FrontendArgs) -> bytes:
    return msgspec.json.format(msgspec.json.encode(args))
