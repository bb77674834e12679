"""``deploy.*``: how many workers, and how they are reached. What they must satisfy: ``launch/check_disagg.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config.options import opt
from toolkit.config.parallel import ParallelConfig


@dataclass(frozen=True)
class PoolConfig:
    """The workers of one phase of disaggregated serving."""

    workers: int = opt(1, "how many; each has its own ranks and weights")
    parallel: ParallelConfig = opt(ParallelConfig(), "degrees of each, as parallel.*")
    engine: dict[str, Any] = opt({}, "engine.* keys that differ in this pool")


@dataclass(frozen=True)
class DeployConfig:
    """How many workers, and how they are reached."""

    mode: Literal["agg", "disagg"] = opt("agg", "agg: one worker prefills and decodes; disagg: a pool for each phase")
    prefill: PoolConfig = opt(PoolConfig(), "disagg: workers that compute prompts")
    decode: PoolConfig = opt(PoolConfig(), "disagg: workers that generate")
    disaggregation_transfer_backend: str = opt(
        "auto",
        "KV from prefill to decode: local (memory of one host, GPUs' too), nixl; auto: local on one host",
    )
    disaggregation_handoff: Literal["bootstrap", "synchronous"] = opt(
        "bootstrap", "bootstrap: decode reserves at once and reads beside prefill; synchronous: after it"
    )
    enforce_disagg: bool = opt(False, "refuse requests while no prefill worker lives; false: decode workers prefill")
    migration_limit: int = opt(3, "how often a request moves on when a worker or a transfer fails")
    transfer_timeout_s: float = opt(30.0, "a transfer without an end for so long has failed")
    worker_timeout_s: float = opt(60.0, "disagg: a worker that says nothing for so long is given up until it speaks")
    restart_workers: int = opt(
        0, "disagg: how often a worker whose processes have ended is started anew; 0: its end ends the run"
    )
    host: str = opt("127.0.0.1", "address the frontend binds; loopback unless told otherwise")
    router: str = opt("round_robin", "which DP rank takes a request: round_robin")
    api_servers: int = opt(
        0, "processes that answer HTTP, each good for some 30,000 tokens/s; 0: one for every two GPUs that generate"
    )
    api_key_env: str = opt("", "environment variable that holds the API key clients must send; empty: none")


POOLS = ("prefill", "decode")
