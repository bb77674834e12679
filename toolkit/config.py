"""The whole experiment as frozen dataclasses.

Owns every config key, its default, its one-line help and its type; turns what Hydra composed into an
``ExpConfig`` (``from_mapping``, ``from_omegaconf``) and fills in what depends on other keys (``resolve``).
The only module that knows OmegaConf. It does not know Slurm, torch or the engine: relations between
degrees and model shapes are checked by ``engine/dims.py`` and ``launch/check.py``.
Read next: ``launch/plan.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

log = logging.getLogger(__name__)

C = typing.TypeVar("C")


def opt(default: Any, help: str) -> Any:
    """A dataclass field with its help text. Lists and dicts are copied for each instance."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """What is served."""

    name: str = opt("smollm2-moe", "served model name, the `model` of the OpenAI API")
    path: str = opt("", "Hugging Face folder: config.json, *.safetensors, tokenizer")
    build: str = opt("", "demo model to build into `path` when the folder is missing: smollm2_moe")
    hf_config: dict[str, Any] | None = opt(None, "config.json given inline, for load_format=dummy without a folder")
    tokenizer: str = opt("", "tokenizer folder; empty: `path`; `bytes`: built-in, one token a byte")
    load_format: Literal["auto", "dummy"] = opt("auto", "auto: read safetensors; dummy: seeded random weights")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "weights and activations; auto: float32 on CPU")
    seed: int = opt(0, "seed of dummy weights")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of one worker. tp_size = attn_tp * dp_size = moe_tp * ep_size * moe_dp_size."""

    tp_size: int = opt(1, "ranks of one worker: the size of the cooperating group, not of a weight split")
    dp_size: int = opt(1, "attention data-parallel groups; attn_tp = tp_size / dp_size")
    ep_size: int = opt(1, "expert-parallel ranks; moe_tp = tp_size / ep_size / moe_dp_size")
    moe_dp_size: int = opt(1, "replicas of the whole expert set inside one worker")
    moe_dense_tp_size: int | None = opt(None, "dense FFN and shared expert: null: split over tp_size, 1: replicated")
    enable_dp_lm_head: bool = opt(False, "split the vocabulary over attn_tp only, not over tp_size: no gather over DP")
    enable_dp_attention: bool = opt(False, "needed for dp_size > 1: each DP group has its own requests and KV cache")


@dataclass(frozen=True)
class AttentionDpConfig:
    """Holding prefills back until DP ranks can run them in the same step (TensorRT-LLM's attention_dp_config)."""

    enable_balance: bool = opt(False, "hold new prompts until every DP rank has one, within the limits below")
    batching_wait_iters: int = opt(10, "steps to hold them when every rank has one and all are decoding")
    timeout_iters: int = opt(50, "steps to hold them when some rank has none")


@dataclass(frozen=True)
class EngineConfig:
    """The engine of every rank; SGLang's words."""

    backend: str = opt("native", "engine adapter: native")
    attention_backend: str = opt("auto", "auto, sdpa; on GPUs: fa3, flash_mla (latent attention), varlen")
    moe_a2a_backend: str = opt("all_to_all", "allgather (SGLang: none), all_to_all; GPUs: deepep, nvlink (one host)")
    deepep_mode: Literal["auto", "normal", "low_latency"] = opt(
        "auto", "auto: low_latency for steps without prefill; normal waits for row counts, low_latency fits CUDA graphs"
    )
    deepep_buffer: Literal["auto", "v2", "legacy"] = opt("auto", "DeepEP's ElasticBuffer or Buffer; auto: the faster")
    deepep_dispatch_dtype: Literal["auto", "fp8", "bf16"] = opt("auto", "rows on their way to FP8 experts; auto: fp8")
    deepep_num_max_dispatch_tokens_per_rank: int = opt(
        0, "rows of a rank for which low_latency has room; 0: what a step without prefill may have"
    )
    moe_runner_backend: str = opt("auto", "expert GEMM: auto, torch, grouped_mm, deep_gemm (GPU)")
    page_size: int = opt(16, "tokens a KV block")
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = opt(
        "auto", "auto: the model's; fp8_e4m3: half the bytes, for latent attention (DeepSeek)"
    )
    max_total_tokens: int = opt(8192, "KV cache capacity of one DP rank, tokens")
    mem_fraction_static: float = opt(
        0.0, "share of a GPU's memory that may be taken: after weights, buffers and graphs the KV cache gets the rest; "
        "0: max_total_tokens as given"
    )  # fmt: skip
    disable_cuda_graph: bool = opt(False, "GPUs: launch every kernel of a decode step, instead of one captured graph")
    cuda_graph_max_bs: int = opt(0, "GPUs: largest decode batch that is captured; 0: max_running_requests")
    disable_overlap_schedule: bool = opt(False, "GPUs: wait for each step's tokens before the next is prepared")
    swa_full_tokens_ratio: float = opt(
        0.0, "KV capacity of sliding-window layers as a share of max_total_tokens; 0: what max_running_requests need"
    )
    max_running_requests: int = opt(64, "requests in one DP rank's running batch")
    max_queued_requests: int = opt(4096, "requests a server holds before it answers 503")
    chunked_prefill_size: int = opt(512, "token budget of one DP rank's step; longer prompts are prefilled in chunks")
    context_length: int = opt(0, "longest prompt + output, tokens; 0: the model's")
    dp_padding_mode: Literal["auto", "max_len", "sum_len"] = opt(
        "auto", "rows of DP ranks in gathers: padded or packed"
    )
    enable_two_batch_overlap: bool = opt(False, "run two half batches, one's communication beside the other's compute")
    attention_dp_config: AttentionDpConfig = opt(AttentionDpConfig(), "when DP ranks start prefills together")
    disable_radix_cache: bool = opt(False, "turn prefix reuse off")
    ep_num_redundant_experts: int = opt(0, "expert replicas beyond one of each; slots = experts + redundant")
    init_expert_location: str = opt(
        "trivial", "where experts start: trivial, a .pt or .json file, or JSON (physical_to_logical_map, logical_count)"
    )
    ep_dispatch_algorithm: Literal["static", "dynamic", "weighted"] | None = opt(
        None, "replica a token goes to: static (nearest), dynamic (in turn), weighted (levels each batch); null: static"
    )
    enable_eplb: bool = opt(False, "move experts between ranks while serving, so that their load stays even")
    eplb_algorithm: Literal["auto", "global", "hierarchical", "spill"] = opt(
        "auto", "placements: global, hierarchical (a group's experts on one node), spill; auto: what nodes allow"
    )
    eplb_rebalance_num_iterations: int = opt(1000, "forward passes between two looks at the balance")
    eplb_rebalance_layers_per_chunk: int | None = opt(
        None, "layers moved at a time; null: as many as the spare buffers (one layer's slots) hold"
    )
    eplb_min_rebalancing_utilization_threshold: float = opt(
        1.0, "no rebalance while balancedness (mean / busiest rank) is above this; 1: always look for one"
    )
    eplb_transfer_budget: float = opt(
        0.05, "largest share of the slots that a rebalance moves; the first one, from a trivial placement, may move all"
    )
    expert_distribution_recorder_mode: Literal["stat", "stat_approx", "per_pass", "per_token"] | None = opt(
        "stat",
        "stat: counts by top-k ids, a window; stat_approx: by rows received; per_pass, per_token: each pass; null: off",
    )
    expert_distribution_recorder_window: int = opt(8, "forward passes a recorder window")
    expert_distribution_recorder_buffer_size: int = opt(256, "per_pass, per_token: passes kept for a dump, the newest")
    random_seed: int = opt(0, "seed for requests that bring none")


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
        "KV from prefill to decode: local (memory of one host, GPUs' too), nixl; auto: local for CPU ranks of one host",
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
    api_key_env: str = opt("", "environment variable that holds the API key clients must send; empty: none")


@dataclass(frozen=True)
class HealthConfig:
    """How a run is watched."""

    stall_s: float = opt(180.0, "silence that ends a run: no progress in loading, or no step with requests in flight")
    preflight: bool = opt(True, "look at every node before ranks start: GPUs, links, memory, disk, ports, clock")
    min_disk_gb: float = opt(1.0, "preflight: free space that run folder and temporary folder must have, 10^9 bytes")
    max_clock_offset_ms: float = opt(50.0, "preflight: most that a node's clock may differ from the first node's")
    sample_interval_s: float = opt(
        1.0, "seconds between two samples of each node's GPUs, CPUs, memory, network; 0: none"
    )


@dataclass(frozen=True)
class ClusterConfig:
    """Where the processes run."""

    launcher: Literal["local", "slurm"] = opt("local", "local: processes of this machine; slurm: a Slurm job")
    device: Literal["auto", "cpu", "cuda"] = opt("cpu", "what a rank computes on; auto: cuda where this host has one")
    gpus_per_node: int = opt(8, "ranks a node (GPUs, or CPU ranks where device=cpu)")
    gpu_memory_gb: float = opt(0.0, "memory of one GPU, 10^9 bytes; 0: not checked")
    cpu_threads_per_rank: int = opt(1, "torch threads of a CPU rank")
    port: int = opt(0, "first of the consecutive ports of a run; 0: a free range is looked for")
    results_dir: str = opt("results", "run folders are made under it")
    env: dict[str, str] = opt({}, "environment of every process, e.g. {NCCL_DEBUG: WARN}")
    role_env: dict[str, dict[str, str]] = opt(
        {}, "the same for one role: {rank: {...}, frontend: {...}, loadgen: {...}}"
    )
    network_interface: str = opt(
        "",
        "interface between ranks: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; empty: the route between nodes, NCCL's own",
    )
    # what is asked of Slurm
    partition: str = opt("", "Slurm partition; empty: the cluster's default")
    account: str = opt("", "Slurm account; empty: the user's default")
    qos: str = opt("", "quality of service; empty: the default")
    reservation: str = opt("", "Slurm reservation")
    constraint: str = opt("", "features that nodes must have")
    nodelist: str = opt("", "take these nodes, e.g. node[1-4]")
    exclude: str = opt("", "do not take these nodes")
    time_min: int = opt(60, "time limit of the job, minutes")
    signal_s: int = opt(120, "so many seconds before its limit the run is ended in order and kept")
    exclusive: bool = opt(True, "whole nodes: nobody else's job beside the ranks")
    mem: str | int = opt("0", "memory of a node (--mem); 0: all of it; empty: the cluster's default")
    cpus_per_node: int = opt(0, "CPUs of a node where exclusive=false; 0: one for each process and one to spare")
    gpus_by: Literal["gpus-per-node", "gres", "none"] = opt(
        "gpus-per-node",
        "how GPUs are asked for: --gpus-per-node, --gres=gpu, or not at all (whole-node sites); cpu: not at all",
    )
    gpu_type: str = opt("", "type in that request: h100 gives gpu:h100:8; empty: any")
    segment: int = opt(0, "nodes that must share an NVLink domain (--segment, Slurm 23.11 and later); 0: no matter")
    exclude_bad_nodes: bool = opt(False, "a node that fails the preflight is left out and the job submitted again")
    requeue: bool = opt(
        False, "after preemption, a lost node or the time limit the job starts again and the sweep goes on"
    )
    pools: dict[str, dict[str, Any]] = opt(
        {}, "pool -> cluster keys that differ for its nodes, e.g. {frontend: {partition: cpu}}: a heterogeneous job"
    )
    extra_sbatch: list[str] = opt([], "more sbatch options, e.g. [--comment=wideep, --mail-type=END]")
    extra_srun: list[str] = opt([], "more options of every job step's srun")
    # what is done on its nodes
    setup: list[str] = opt(
        [], "shell lines of the batch script before the run, e.g. [source /etc/profile.d/modules.sh]"
    )
    modules: list[str] = opt([], "environment modules to load (module load ...)")
    venv: str = opt("", "virtual environment that the batch script activates; empty: the Python that submits")
    container_image: str = opt(
        "", "image that ranks and frontend run in: a .sqsh, docker or .sif reference; empty: none"
    )
    container_mounts: list[str] = opt([], "SRC:DST[:FLAGS] in the container; the run folder and the toolkit are added")
    container_runtime: Literal["pyxis", "apptainer"] = opt(
        "pyxis", "pyxis: srun --container-image; apptainer: apptainer exec"
    )
    container_python: str = opt("python3", "interpreter inside the container")
    pack: Literal["auto", "allocation", "array"] = opt(
        "auto",
        "-m on Slurm: auto: an array with a task for each deployment, which runs all of its loads; allocation: one job "
        "for all runs, one after the other; array: a task for each run",
    )
    follow: bool = opt(True, "stay and show the job's progress; false: submit and return")


@dataclass(frozen=True)
class LoadConfig:
    """The sweep. The same keys, without `load.`, are the options of `python -m toolkit.loadgen`."""

    concurrency: list[int] = opt([1, 2, 4, 8], "load points: requests in flight at a time (closed loop)")
    request_rate: list[float] = opt([], "load points: requests a second (open loop), in place of concurrency")
    arrival: Literal["poisson", "constant", "gamma", "trace"] = opt(
        "poisson", "gaps of request_rate; trace: when the dataset says, in place of both"
    )
    burstiness: float = opt(1.0, "shape of arrival=gamma: 1 is poisson, less is burstier, more is evener")
    max_concurrency: int = opt(0, "open loop: most requests in flight; a due one waits inside the client; 0: no cap")
    ramp_s: float = opt(0.0, "begin with less: slots start, or the rate grows, over so many seconds")
    speedup: float = opt(1.0, "arrival=trace: how much faster than recorded")
    duration_s: float = opt(30.0, "open loop without num_requests: seconds of measured arrivals")
    num_requests: int = opt(0, "measured requests a point; 0: max(min_requests, requests_per_slot * concurrency)")
    min_requests: int = opt(4, "fewest measured requests of a point")
    requests_per_slot: int = opt(2, "measured requests of a point for each unit of concurrency")
    warmup_requests: int = opt(
        -1, "requests before the measured ones, in no figure; -1: concurrency, or a tenth of an open loop's"
    )
    phase: Literal["all", "prefill", "decode"] = opt(
        "all", "prefill: one token an answer, so that prefill alone is loaded; decode: slowed down until all requests "
        "of a point generate, so that its batch is full"
    )  # fmt: skip
    repeat: int = opt(1, "passes over all load points, one after the other; their spread is drawn")
    cancel_fraction: float = opt(0.0, "share of the requests that the client gives up; 0 to 1")
    cancel_after_s: float = opt(1.0, "when it gives them up, seconds after sending")
    dataset: str = opt(
        "prompts", "where requests come from: prompts, random, sharegpt, mooncake, azure, burstgpt, trace"
    )
    dataset_path: str = opt("", "file of the dataset; empty: the bundled prompts")
    endpoint: Literal["chat", "completions"] = opt("chat", "/v1/chat/completions or /v1/completions")
    isl: int = opt(128, "prompt length of dataset=random, tokens")
    isl_stddev: float = opt(0.0, "its standard deviation, tokens")
    osl: int = opt(32, "max_tokens of every request, where the dataset does not say")
    osl_stddev: float = opt(0.0, "dataset=random: standard deviation of osl, tokens")
    range_ratio: float = opt(0.0, "dataset=random: lengths evenly from (1 - ratio) to (1 + ratio) of isl and osl")
    prefix_len: int = opt(0, "dataset=random: tokens at the begin of a prompt that it shares with others")
    num_prefixes: int = opt(1, "dataset=random: how many such prefixes there are")
    turns: int = opt(1, "turns of a conversation, dataset=random and sharegpt; one after the other, with the answers")
    think_s: float = opt(0.0, "pause between an answer and the next turn")
    image: str = opt("", "image file sent with every prompt of dataset=random (endpoint chat)")
    ignore_eos: bool = opt(True, "ask for exactly the length: ignore_eos and min_tokens are sent")
    temperature: float = opt(0.0, "0: greedy")
    seed: int = opt(0, "order of prompts, arrivals, sampling")
    max_failed_share: float = opt(0.01, "share of failed requests above which a load point is invalid")
    max_wrong_length_share: float = opt(0.01, "... of answers that are not as long as asked")
    max_client_verdict: Literal["ok", "degraded", "client_limited"] = opt(
        "degraded", "worst verdict on the load generator itself that leaves a load point valid"
    )
    gone_s: float = opt(3.0, "how long the server may be away before the sweep ends")
    slo_share: float = opt(0.99, "share of good requests that a load point must have")
    search: bool = opt(False, "look for the largest concurrency (or request_rate) in the points' range that meets them")
    workers: int = opt(0, "processes that send; 0: one for each allowed core but one, as far as they have work")
    nodes: int = opt(1, "nodes that send, each with such processes; the first one leads")
    pin: bool = opt(True, "keep each of them on a core of its own, where there are cores enough")
    transport: Literal["auto", "socket", "aiohttp"] = opt(
        "auto", "socket: stamped by the kernel; aiohttp: TLS, proxies; auto: socket where it is possible"
    )
    strict: bool = opt(False, "exit with status 3 when the client's own part in the figures is not ok")
    scrape: bool = opt(True, "keep the server's /metrics in server_metrics.parquet")
    scrape_urls: list[str] = opt([], "more /metrics to keep: URLs")
    scrape_interval_s: float = opt(1.0, "seconds between two looks at /metrics")
    profile: bool = opt(False, "POST /start_profile before each point, /stop_profile after it")
    flush_cache: bool = opt(False, "POST /flush_cache before each point")
    timeout_s: float = opt(600.0, "a request that takes longer is failed")
    slo_ttft_ms: float = opt(0.0, "goodput: a request is good when its TTFT is at most this; 0: no bound")
    slo_itl_ms: float = opt(0.0, "goodput: ... its longest gap between tokens; 0: no bound")
    slo_tpot_ms: float = opt(0.0, "goodput: ... its TPOT; 0: no bound")
    slo_e2e_ms: float = opt(0.0, "goodput: ... its send to last token; 0: no bound")
    record_text: bool = opt(True, "keep every answer's text in requests.parquet")
    record_raw: bool = opt(False, "keep every answer's bytes and when they came in raw.parquet")


@dataclass(frozen=True)
class ExpConfig:
    """One experiment, complete."""

    exp: str = opt("adhoc", "name of the experiment: results/<exp>/<time>/")
    model: ModelConfig = opt(ModelConfig(), "")
    parallel: ParallelConfig = opt(ParallelConfig(), "")
    engine: EngineConfig = opt(EngineConfig(), "")
    deploy: DeployConfig = opt(DeployConfig(), "")
    cluster: ClusterConfig = opt(ClusterConfig(), "")
    health: HealthConfig = opt(HealthConfig(), "")
    load: LoadConfig = opt(LoadConfig(), "")
    rehearsal: dict[str, dict[str, Any]] = opt({}, "group -> keys that a CPU rehearsal of a GPU experiment replaces")
    variants: dict[str, dict[str, Any]] = opt(
        {}, "name -> group -> keys: run this experiment once for each, as <exp>-<name>, and compare with the first"
    )
    compare_with: str = opt("", "run folder (results/<exp>/latest) that the report compares this run with")
    dry_run: bool = opt(False, "print the plan and exit")
    resume: bool = opt(False, "go on with the newest run of this experiment: run only what is not done there")
    run_dir: str = opt("", "run folder; one that holds a run of this experiment is gone on with; empty: a new one")
    emit: Literal["", "sbatch"] = opt(
        "", "sbatch: make the run folder and the job script in it, print the script, submit nothing"
    )


POOLS = ("prefill", "decode")

GROUPS: dict[str, type] = {
    f.name: typing.get_type_hints(ExpConfig)[f.name]
    for f in dataclasses.fields(ExpConfig)
    if dataclasses.is_dataclass(typing.get_type_hints(ExpConfig)[f.name])
}


def register_hydra_defaults() -> None:
    """Offers each group's defaults to Hydra as ``<group>/defaults``, so that a yaml holds only its choices."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for group, cls in GROUPS.items():
        node = OmegaConf.create(dataclasses.asdict(cls()))
        if group == "deploy":  # any engine key may be added there; `resolve` says which ones there are
            for pool in POOLS:
                node[pool].engine = OmegaConf.create({}, flags={"struct": False})
        store.store(group=group, name="defaults", node=node)


def from_omegaconf(node: Any) -> ExpConfig:
    """What Hydra composed -> ``ExpConfig``. Raises ``ValueError`` on an unknown key or a value of a wrong type."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node, resolve=True)
    return from_mapping(typing.cast(dict[str, Any], plain), ExpConfig)


def variants(node: Any, overrides: list[str]) -> list[tuple[Any, list[str]]]:
    """What Hydra composed, once for each of its ``variants``; itself where it has none.

    A variant's keys replace the experiment's; its name is added to ``exp``; all but the first are compared with it.
    """
    from omegaconf import OmegaConf

    names = list(node.get("variants") or {})
    found: list[tuple[Any, list[str]]] = []
    for name in names:
        made = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
        made.variants = {}
        made = OmegaConf.merge(made, node.variants[name] or {})
        made.exp = f"{node.exp}-{name}"
        if name != names[0]:
            made.compare_with = str(Path(node.cluster.results_dir).absolute() / f"{node.exp}-{names[0]}" / "latest")
        found.append((made, [*overrides, f"variant={name}"]))
    return found or [(node, overrides)]


def read_saved(file: Path, overrides: Sequence[str]) -> Any:
    """A run folder's config.yaml as Hydra would have composed it, with ``overrides`` (``load.osl=8``), for a new run.

    What a rehearsal replaces was replaced when the file was written, and is not replaced again.
    """
    from omegaconf import OmegaConf

    new = {"rehearsal": None, "resume": False, "run_dir": "", "dry_run": False}
    node = OmegaConf.merge(OmegaConf.load(file), new)
    node.rehearsal = {}
    return OmegaConf.merge(node, OmegaConf.from_dotlist(list(overrides)))


def from_mapping(values: dict[str, Any], cls: type[C]) -> C:
    """A plain dict -> the config dataclass ``cls``.

    Raises:
        ValueError: unknown key (with the closest known one), or a value of a wrong type.
    """
    _refuse_unknown(values, cls, "")
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), values)) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """A config dataclass -> plain dict, the inverse of ``from_mapping``."""
    return dataclasses.asdict(config)


def resolve(config: ExpConfig, explicit: Collection[str] = ()) -> ExpConfig:
    """Fills in what depends on other keys and returns a new config; every change is logged.

    - ``cluster.device=auto`` becomes cuda where this host has NVIDIA's driver, cpu elsewhere.
    - ``cluster.device=cpu``: the keys of ``rehearsal`` replace the experiment's, except those in ``explicit``
      (what the user named on the command line: ``model``, ``load.osl``).
    - ``engine.moe_a2a_backend=none`` (SGLang's word) becomes ``allgather``.
    - ``model.dtype=auto`` becomes float32 on CPU and bfloat16 on GPUs.
    - ``deploy.mode=disagg``: ``deploy.decode.engine`` gets ``disable_radix_cache=true``, and the transfer backend is
      chosen where it is auto.
    - ``model.path`` and ``cluster.results_dir`` lose ``~``; an empty ``model.tokenizer`` becomes ``model.path``.
    """
    values = to_mapping(config)
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"

    def put(group: str, key: str, value: Any) -> None:
        if values[group].get(key) != value:
            log.info("resolved %s.%s: %s -> %s", group, key, values[group].get(key), value)
            values[group][key] = value

    put("cluster", "device", device)
    if device == "cpu":
        for group, keys in config.rehearsal.items():
            if group not in GROUPS:
                raise ValueError(f"rehearsal.{group} is not a config group{_closest(group, list(GROUPS))}")
            for key, value in keys.items():
                if group not in explicit and f"{group}.{key}" not in explicit:
                    put(group, key, value)
    if values["engine"]["moe_a2a_backend"] == "none":
        put("engine", "moe_a2a_backend", "allgather")
    if values["model"]["dtype"] == "auto":
        put("model", "dtype", "float32" if device == "cpu" else "bfloat16")
    for group, key in (("model", "path"), ("cluster", "results_dir")):
        if values[group][key]:
            put(group, key, str(Path(values[group][key]).expanduser()))
    if config.deploy.mode == "disagg":
        _resolve_disagg(values, explicit, put)
    if not values["model"]["tokenizer"]:
        put("model", "tokenizer", values["model"]["path"] or "bytes")
    return from_mapping(values, ExpConfig)


def _resolve_disagg(
    values: dict[str, Any], explicit: Collection[str], put: typing.Callable[[str, str, Any], None]
) -> None:
    ignored = sorted(name for name in explicit if name == "parallel" or name.startswith("parallel."))
    if ignored:
        raise ValueError(
            f"{ignored[0]} is of aggregated serving, deploy.mode=disagg has degrees for each pool: use "
            "parallel@deploy.prefill.parallel=CHOICE and parallel@deploy.decode.parallel=CHOICE, or "
            "deploy.prefill.parallel.KEY=VALUE"
        )
    deploy, cluster = values["deploy"], values["cluster"]
    for pool in POOLS:
        _refuse_unknown(deploy[pool]["engine"], EngineConfig, f"deploy.{pool}.engine.")
    # What a rank has read of another's cache is only ever seen by its own request (engine/disagg/README.md says why).
    engine = {"disable_radix_cache": True}
    if deploy["decode"]["engine"].get("disable_radix_cache") is not True:
        log.info("resolved deploy.decode.engine.disable_radix_cache: -> True")
    deploy["decode"]["engine"] |= engine
    if deploy["disaggregation_transfer_backend"] == "auto":
        one_host = (cluster["launcher"], cluster["device"]) == ("local", "cpu")
        put("deploy", "disaggregation_transfer_backend", "local" if one_host else "nixl")


def help_text() -> str:
    """Every key with its default and help, for ``--help``."""
    lines: list[str] = []
    for group, cls in GROUPS.items():
        lines.append(f"\n{group}: {(cls.__doc__ or '').splitlines()[0]}")
        lines += _help_lines(cls, group)
    return "\n".join(lines)


def _help_lines(cls: type, prefix: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        default = getattr(cls(), f.name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        if dataclasses.is_dataclass(default):
            shown = "..."
        yield f"  {prefix}.{f.name}={shown if shown != '' else chr(39) * 2}  {f.metadata['help']}"
        if isinstance(default, (PoolConfig, AttentionDpConfig)):
            yield from _help_lines(type(default), f"{prefix}.{f.name}")


def explain_override(text: str) -> str | None:
    """Why the command-line override ``text`` (``group.key=value``) cannot be right, or None.

    Hydra's own message advises ``+group.key``, which would only move the mistake; this one names the key meant.
    """
    match = re.match(r"^\+{0,2}~?(\w+)\.(\w+)(?:=|$)", text)
    if match is None or match[1] not in GROUPS:
        return None
    known = [f.name for f in dataclasses.fields(GROUPS[match[1]])]
    if match[2] in known:
        return None
    return f"{match[1]}.{match[2]} is not a config key{_closest(match[2], known)}"


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _refuse_unknown(values: dict[str, Any], cls: type, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{prefix}{key} is not a config key{_closest(key, list(hints))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _refuse_unknown(value, typing.cast(type, hints[key]), f"{prefix}{key}.")


def _explain(message: str, values: dict[str, Any]) -> str:
    """msgspec's message (``Expected `int`, got `str` - at `$.a.b```) with the field and its value in front."""
    what, _, where = message.partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    value: Any = values
    for part in re.findall(r"\w+", path):
        value = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else value
    return f"{path}={value!r}: {what}{_choices(path)}"


def _choices(path: str) -> str:
    """The values a key allows, when they are few."""
    group, _, name = path.partition(".")
    hint = typing.get_type_hints(GROUPS[group]).get(name) if group in GROUPS else None
    options = [
        arg
        for part in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
        for arg in (typing.get_args(part) if typing.get_origin(part) is Literal else [])
    ]
    return f"; use one of: {', '.join(map(str, options))}" if options else ""
