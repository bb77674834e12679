"""Writes a run folder as a real run would, through ``toolkit.records``: requests of a queueing server whose steps
slow down with load, expert counts of a skewed gate, and forward passes that wait for the busiest GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from toolkit import records
from toolkit.analysis.imbalance import window_loads
from toolkit.analysis.sweep_row import sweep_row
from toolkit.records.experts import ExpertCounts, write_experts
from toolkit.records.files import write_json
from toolkit.records.requests import RequestRecord, read_requests, write_requests
from toolkit.records.samples import HOST, NodeSample
from toolkit.records.status import PointStatus, RunStatus, write_status
from toolkit.records.steps import StepRecord, steps_path
from toolkit.records.streams import open_rows
from toolkit.records.sweep import write_sweep
from toolkit.records.tables import to_table, write_table

EPOCH = 1_760_000_000.0


def record(**changes: Any) -> RequestRecord:
    """One successful request of five tokens in three chunks, with ``changes``."""
    values: dict[str, Any] = {
        "point": 0, "concurrency": 1, "request_id": "r0", "prompt_id": "p0", "warmup": False, "status": "ok",
        "error": "", "http_status": 200, "t_send": EPOCH, "scheduled_s": 0.0, "first_byte_s": 0.09,
        "first_token_s": 0.1, "last_token_s": 0.4, "end_s": 0.41, "prompt_tokens": 10, "cached_tokens": 0,
        "output_tokens": 5, "expected_output_tokens": 5, "finish_reason": "length", "dp_rank": 0,
        "chunk_s": [0.1, 0.2, 0.4], "chunk_tokens": [1, 1, 3], "output_text": "text",
    }  # fmt: skip
    return RequestRecord(**(values | changes))


def failure(**changes: Any) -> RequestRecord:
    """One request that the server refused."""
    nan = math.nan
    refused: dict[str, Any] = {
        "status": "error", "error": "HTTP 503: overloaded", "http_status": 503, "first_token_s": nan,
        "last_token_s": nan, "output_tokens": 0, "finish_reason": "", "chunk_s": [], "chunk_tokens": [],
    }  # fmt: skip
    return record(**(refused | changes))


def point_records(
    rng: np.random.Generator, index: int, concurrency: int, begin: float, requests: int, osl: int = 32
) -> list[RequestRecord]:
    """A closed loop of ``concurrency`` slots; the first request of each slot is warm-up."""
    free = [begin + 0.01 * slot for slot in range(concurrency)]
    rows = []
    step = 0.02 * (1 + concurrency / 12)
    for number in range(concurrency + requests):
        slot = int(np.argmin(free))
        ttft = 0.08 + 0.012 * concurrency * rng.random() + 0.03 * rng.random()
        gaps = step * rng.gamma(30, 1 / 30, osl - 1)
        gaps[rng.random(osl - 1) < 0.04 * concurrency / 4] += 0.06  # a prefill of another request in the same step
        times = ttft + np.concatenate([[0.0], np.cumsum(gaps)])
        rows.append(
            record(
                point=index, concurrency=concurrency, request_id=f"{index}-{number}", prompt_id=f"p{number % 48}",
                warmup=number < concurrency, t_send=free[slot], first_byte_s=ttft - 0.002, first_token_s=ttft,
                first_visible_s=ttft,
                last_token_s=float(times[-1]), end_s=float(times[-1]) + 0.001, prompt_tokens=int(rng.integers(20, 200)),
                output_tokens=osl, expected_output_tokens=osl, dp_rank=number % 4, chunk_s=times.tolist(),
                chunk_tokens=[1] * osl,
            )
        )  # fmt: skip
        free[slot] = rows[-1].t_send + rows[-1].end_s
    return rows


def skewed_experts(
    rng: np.random.Generator, begin: float, end: float, layers: int = 30, experts: int = 8, ep_size: int = 4
) -> ExpertCounts:
    """Windows of half a second whose counts follow one skewed popularity a layer; no redundant expert."""
    popularity = rng.dirichlet(np.full(experts, 1.5), size=layers)
    edges = np.arange(begin, end + 0.5, 0.5)
    counts = np.stack([[rng.multinomial(640, p) for p in popularity] for _ in edges[1:]]).astype(np.int64)
    return ExpertCounts(
        counts=counts,
        times=np.stack([edges[:-1], edges[1:]], axis=1),
        placement=np.tile(np.arange(experts, dtype=np.int32), (1, layers, 1)),
        placement_times=np.array([begin - 10]),
        layer_ids=np.arange(layers, dtype=np.int32),
        ep_size=ep_size,
        pairs=np.stack([np.outer(p, p) * (1 - np.eye(experts)) * 1e4 for p in popularity]).astype(np.int64),
    )


def skewed_steps(
    rng: np.random.Generator, begin: float, end: float, experts: ExpertCounts, held_ms: float = 0.02, dp_size: int = 4
) -> list[StepRecord]:
    """Passes of 20 ms and more until ``end``: ``held_ms`` longer for each assignment that the busiest GPU has above
    the mean one (summed over layers, a pass) in the window they lie in."""
    windows = window_loads(experts)
    rows, at, step = [], begin + 0.01, 0  # not on the edge of a window
    while at < end:
        index = min(max(int(np.searchsorted(experts.times[:, 0], at, "right")) - 1, 0), len(experts.times) - 1)
        seconds = float(experts.times[index, 1] - experts.times[index, 0])
        excess = float(windows.excess()[index]) * 0.05 / seconds  # about 20 passes a second
        tokens = rng.integers(1, 9, dp_size)
        duration = 0.02 + 0.0004 * tokens.sum() + held_ms * excess / 1e3 + 0.0002 * rng.random()
        for rank in range(dp_size):
            used = int(20 + 6 * tokens[rank])
            rows.append(
                StepRecord(step, at, duration, rank, int(tokens[rank]), int(tokens[rank]), 0, int(tokens[rank]), 0,
                           used, 1024, int(step % 50 == 7 and rank == 1))
            )  # fmt: skip
        at, step = at + max(duration + 0.001, 0.05), step + 1
    return rows


def node_samples(begin: float, end: float, nodes: int = 2, gpus: int = 4) -> list[NodeSample]:
    """A sample a second of each GPU and node: GPU g of node n draws 300 + 10 g + n W, and slows down when it is hot."""
    rows = []
    for second in range(int(end - begin) + 2):
        at = begin - 1 + second
        for n in range(nodes):
            hot = n == 1 and second > (end - begin) / 2
            rows.append(
                NodeSample(at, f"node{n}", HOST, 0.3 + 0.1 * n, 64 * 10**9, 512 * 10**9,
                           net_rx_bytes=1e9 * second, net_tx_bytes=5e8 * second)
            )  # fmt: skip
            rows += [
                NodeSample(at, f"node{n}", g, 0.9, 70 * 10**9, 80 * 10**9, 300.0 + 10 * g + n, 60.0 + 20 * hot,
                           1400.0 if hot and g == 2 else 1980.0, 2619.0, 0x40 if hot and g == 2 else 0)
                for g in range(gpus)
            ]  # fmt: skip
    return rows


def make_run(results: Path, points: tuple[int, ...] = (1, 2, 4, 8), requests_per_slot: int = 4) -> Path:
    """A finished run under ``results/smoke/``; the last load point has one failed request."""
    rng = np.random.default_rng(7)
    folder = records.new_run_folder(results, "smoke")
    rows: list[RequestRecord] = []
    begin = EPOCH
    for index, concurrency in enumerate(points):
        rows += point_records(rng, index, concurrency, begin, requests_per_slot * concurrency)
        begin = max(row.t_send + row.end_s for row in rows) + 0.2
    rows.append(failure(point=len(points) - 1, concurrency=points[-1], request_id="late", t_send=begin - 0.5))
    write_requests(folder, rows)
    requests = read_requests(folder)
    write_sweep(folder, [sweep_row(requests[requests["point"] == i], c, num_gpus=4) for i, c in enumerate(points)])
    experts = skewed_experts(rng, EPOCH, begin)
    write_experts(folder / records.EXPERTS, experts)
    (folder / records.STEPS).mkdir()
    with open_rows(steps_path(folder, 0), StepRecord) as write:
        write(skewed_steps(rng, EPOCH, begin, experts))
    write_table(folder / records.NODES, to_table(NodeSample, node_samples(EPOCH, begin)))
    write_status(folder, RunStatus("done", "", [PointStatus(c, "done") for c in points]))
    ranks = [{"rank": r, "dp_rank": r, "ep_rank": r, "node": r // 2} for r in range(4)]
    write_json(
        folder / records.PLAN, {"mapping": "DEP=4", "num_nodes": 2, "num_gpus": 4, "workers": [{"ranks": ranks}]}
    )
    write_json(
        folder / records.MANIFEST,
        {
            "git": {"commit": "0123abc", "dirty": False},
            "host": {"cpu": "8 cores"},
            "command": ["toolkit", "+exp=smoke"],
        },
    )
    config = {
        "exp": "smoke",
        "model": {"name": "smollm2-moe"},
        "parallel": {"tp_size": 4, "dp_size": 4, "ep_size": 4, "enable_dp_attention": True},
        "engine": {"moe_a2a_backend": "all_to_all", "ep_num_redundant_experts": 0},
        "load": {"concurrency": list(points), "osl": 32, "slo_ttft_ms": 150.0, "slo_tpot_ms": 100.0},
    }
    (folder / records.CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / records.OVERRIDES).write_text("- +exp=smoke\n", encoding="utf-8")
    return folder
