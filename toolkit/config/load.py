"""``load.*``: the sweep. Read next: ``loadgen/points.py``, which makes load points of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config.options import opt


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
    cancel_fraction: float = opt(0.0, "share of the requests that the client gives up: cancelled, not failed; 0 to 1")
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
    think_s: float = opt(0.0, "seconds between an answer and the next turn of its conversation")
    image: str = opt("", "image file sent with every prompt of dataset=random (endpoint chat)")
    ignore_eos: bool = opt(True, "ask for exactly the length: ignore_eos and min_tokens are sent")
    temperature: float = opt(0.0, "0: greedy")
    seed: int = opt(0, "order of prompts, arrivals, sampling")
    extra_body: dict[str, Any] = opt({}, "more fields of every request's body, such as {top_p: 0.9}")
    headers: dict[str, str] = opt({}, "more HTTP headers of every request; they are written down: no secrets")
    timeout_s: float = opt(600.0, "a request that takes longer is failed")
    max_failed_share: float = opt(0.01, "share of failed requests above which a load point is invalid")
    max_wrong_length_share: float = opt(0.01, "... of answers that are not as long as asked")
    max_client_verdict: Literal["ok", "degraded", "client_limited"] = opt(
        "degraded", "worst verdict on the load generator itself that leaves a load point valid"
    )
    gone_s: float = opt(3.0, "how long the server may be away before the sweep ends")
    slo_ttft_ms: float = opt(0.0, "a request is good when its TTFT is at most this; 0: no bound")
    slo_itl_ms: float = opt(0.0, "... its longest gap between tokens; 0: no bound")
    slo_tpot_ms: float = opt(0.0, "... its TPOT; 0: no bound")
    slo_e2e_ms: float = opt(0.0, "... its send to last token; 0: no bound")
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
    record_text: bool = opt(True, "keep every answer's text in requests.parquet")
    record_raw: bool = opt(False, "keep every answer's bytes and when they came in raw.parquet")
