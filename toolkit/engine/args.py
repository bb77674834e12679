"""What one engine rank or frontend is told at its start: a JSON file that the launcher writes.

No torch, no hydra: the engine can be started by anything that writes this file and sets ``TOKEN_ENV``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig

TOKEN_ENV = "TOOLKIT_RUN_TOKEN"  # the secret of the run; in the environment, never in a file or on a command line


class Disaggregation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker's part in disaggregated serving.

    Attributes:
        mode: prefill: computes prompts and keeps their KV until it was read; decode: reads it and goes on.
        backend: how it is read, ``local`` or ``nixl``.
        timeout_s: a transfer without an end for so long has failed.
        transfers_dir: run folder in which the leaders of a decode worker keep a row a transfer; empty: not written.
    """

    mode: Literal["prefill", "decode"]
    backend: str
    timeout_s: float
    transfers_dir: str = ""


class WorkerArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker: the ranks that run one model together.

    Attributes:
        rank_hosts: address of each rank, [tp_size].
        inbox_ports: port of each rank's ZeroMQ inbox, on its own host, [tp_size].
        dist_port: torch.distributed rendezvous, on rank 0's host.
        frontend: (host, port) of the frontend's ZeroMQ inbox.
        local_ranks: index of each rank on its host (its GPU), [tp_size].
        experts_path: where rank 0 keeps experts.npz; empty: not written.
        steps_dir: run folder in which the leader of each DP rank keeps a row a forward pass; empty: not written.
        profile_dir: where profiles go, a folder each; empty: there are none.
        pulse_dir: where each rank says every second where it is; empty: it does not.
        name: of the worker, in its files and figures.
        disaggregation: None: it prefills and decodes.
    """

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    device: str
    cpu_threads: int
    rank_hosts: list[str]
    inbox_ports: list[int]
    local_ranks: list[int]
    dist_port: int
    frontend: tuple[str, int]
    experts_path: str = ""
    steps_dir: str = ""
    profile_dir: str = ""
    pulse_dir: str = ""
    name: str = "rank"
    disaggregation: Disaggregation | None = None


class WorkerAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker as the frontend reaches it.

    Attributes:
        pool: agg: prefills and decodes.
        inbox: (host, port) of the frontend's ZeroMQ inbox for this worker, which each of its ranks connects to.
        rank_inboxes: (host, port) of each rank's inbox, by rank.
    """

    name: str
    pool: Literal["agg", "prefill", "decode"]
    parallel: ParallelConfig
    inbox: tuple[str, int]
    rank_inboxes: list[tuple[str, int]]


class FrontendArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The OpenAI server in front of all workers.

    Attributes:
        engine: options that all workers share.
        http: (host, port) it serves on.
        api_key_env: environment variable with the API key; empty: none is asked for.
        api_servers: processes that answer completions; 1: the frontend itself.
        handoff, enforce_disagg, migration_limit: ``deploy.*`` of the same names.
        worker_timeout_s: a worker that says nothing for so long is given up until it speaks; 0: never.
    """

    model: ModelConfig
    engine: EngineConfig
    http: tuple[str, int]
    workers: list[WorkerAddress]
    router: str = "round_robin"
    api_key_env: str = ""
    api_servers: int = 1
    handoff: Literal["bootstrap", "synchronous"] = "bootstrap"
    enforce_disagg: bool = False
    migration_limit: int = 0
    worker_timeout_s: float = 0.0


def read_worker_args(path: str | Path) -> WorkerArgs:
    return msgspec.json.decode(Path(path).read_bytes(), type=WorkerArgs)


def read_frontend_args(path: str | Path) -> FrontendArgs:
    return msgspec.json.decode(Path(path).read_bytes(), type=FrontendArgs)


def run_token() -> str:
    """The run's secret. Raises ``ValueError`` when the launcher did not set it."""
    token = os.environ.get(TOKEN_ENV, "")
    if not token:
        raise ValueError(f"{TOKEN_ENV} is not set: the launcher sets it to a secret shared by one run's processes")
    return token
