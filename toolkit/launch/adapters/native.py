"""The engine of this project: one process a rank, one frontend; arguments in a JSON file for each worker.

Knows ``engine/args.py`` and nothing else of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from toolkit import records
from toolkit.config.deploy import DeployConfig
from toolkit.config.experiment import ExpConfig
from toolkit.engine.args import Disaggregation, FrontendArgs, WorkerAddress, WorkerArgs
from toolkit.launch.adapters import Processes
from toolkit.launch.launcher import STATE_DIR, WORKER_GROUP, ProcessSpec
from toolkit.launch.plan import DeploymentPlan, WorkerPlan
from toolkit.launch.pools import AGG, Pool, worker_pools
from toolkit.launch.srun import engine_python
from toolkit.launch.stall import pulse_folder

FRONTEND_ARGS = f"{STATE_DIR}/frontend-args.json"


def processes(plan: DeploymentPlan, cfg: ExpConfig, hosts: Sequence[str], run_dir: Path) -> Processes:
    """The ranks of each worker in order, then the frontend."""
    env = _env(cfg, hosts)
    ranks = [
        ProcessSpec(
            role=worker.name,
            index=rank.rank,
            argv=(*_python(cfg, "toolkit.engine.worker"), str(run_dir / worker_args(worker)), "--rank", str(rank.rank)),
            env=env,
            node=rank.node,
            group=f"{WORKER_GROUP}{worker.index}",
        )
        for worker in plan.workers
        for rank in worker.ranks
    ]
    frontend = ProcessSpec(
        role="frontend",
        index=0,
        argv=(*_python(cfg, "toolkit.engine.frontend"), str(run_dir / FRONTEND_ARGS)),
        env=env,
        node=plan.frontend.node,
    )
    by_name = {pool.name: pool for pool in worker_pools(cfg)}
    files = {
        worker_args(worker): _json(_worker_args(plan, worker, by_name[worker.pool], cfg, hosts, run_dir))
        for worker in plan.workers
    }
    return Processes((*ranks, frontend), files | {FRONTEND_ARGS: _json(_frontend_args(plan, by_name, cfg, hosts))})


def worker_args(worker: WorkerPlan) -> str:
    """The worker's file of arguments, inside the run folder."""
    return f"{STATE_DIR}/{'worker' if worker.pool == AGG else worker.name}-args.json"


def _python(cfg: ExpConfig, module: str) -> tuple[str, ...]:
    return (engine_python(cfg.cluster), "-m", module, "--args")


def _worker_args(
    plan: DeploymentPlan, worker: WorkerPlan, pool: Pool, cfg: ExpConfig, hosts: Sequence[str], run_dir: Path
) -> WorkerArgs:
    folder = run_dir if worker.index == plan.main_worker.index else run_dir / records.WORKERS / worker.name
    return WorkerArgs(
        model=cfg.model,
        parallel=pool.parallel,
        engine=pool.engine,
        device=cfg.cluster.device,
        cpu_threads=cfg.cluster.cpu_threads_per_rank,
        rank_hosts=[hosts[rank.node] for rank in worker.ranks],
        inbox_ports=[rank.inbox_port for rank in worker.ranks],
        local_ranks=[rank.local_rank for rank in worker.ranks],
        dist_port=worker.dist_port,
        frontend=(hosts[plan.frontend.node], worker.inbox_port),
        experts_path=str(folder / records.EXPERTS),
        steps_dir=str(folder),
        profile_dir=str(folder / records.PROFILES),
        pulse_dir=str(pulse_folder(run_dir, worker.name)),
        name=worker.name,
        disaggregation=_disaggregation(worker.pool, cfg.deploy, run_dir),
    )


def _disaggregation(pool: str, deploy: DeployConfig, run_dir: Path) -> Disaggregation | None:
    if pool == AGG:
        return None
    mode: Literal["prefill", "decode"] = "prefill" if pool == "prefill" else "decode"
    transfers = str(run_dir) if mode == "decode" else ""
    return Disaggregation(mode, deploy.disaggregation_transfer_backend, deploy.transfer_timeout_s, transfers)


def _frontend_args(
    plan: DeploymentPlan, by_name: Mapping[str, Pool], cfg: ExpConfig, hosts: Sequence[str]
) -> FrontendArgs:
    deploy, disagg = cfg.deploy, cfg.deploy.mode == "disagg"
    return FrontendArgs(
        model=cfg.model,
        engine=by_name[plan.main_worker.pool].engine,
        http=(plan.frontend.host, plan.frontend.http_port),
        workers=[
            WorkerAddress(
                name=worker.name,
                pool=cast(Any, worker.pool),
                parallel=by_name[worker.pool].parallel,
                inbox=(hosts[plan.frontend.node], worker.inbox_port),
                rank_inboxes=[(hosts[rank.node], rank.inbox_port) for rank in worker.ranks],
            )
            for worker in plan.workers
        ],
        router=deploy.router,
        api_key_env=deploy.api_key_env,
        api_servers=plan.frontend.api_servers,
        handoff=deploy.disaggregation_handoff,
        enforce_disagg=deploy.enforce_disagg,
        migration_limit=deploy.migration_limit if disagg else 0,
        worker_timeout_s=deploy.worker_timeout_s if disagg else 0.0,
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
