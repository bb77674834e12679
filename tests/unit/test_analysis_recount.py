"""Every figure of a report a second time, from raw rows, in plain Python: no numpy, no pandas arithmetic, no toolkit
formula. What the two ways agree on is not a slip of one of them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.unit.analysis_run import make_run
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.findings import goodputs
from toolkit.analysis.finish import complete_sweep
from toolkit.records.experts import ExpertCounts, read_experts
from toolkit.records.sweep import SWEEP_COLUMNS, SWEEP_TEXTS, read_sweep

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("results"))
    complete_sweep(Run(folder))
    return folder


def linear(values: list[float], percent: float) -> float:
    """The definition: position percent/100 · (n - 1) between sorted neighbours."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def gaps_of(row: Row) -> list[float]:
    gaps = []
    for before, now, count in zip(row["chunk_s"], row["chunk_s"][1:], row["chunk_tokens"][1:]):
        gaps += [(now - before) / count] * count
    return gaps


def steady_of(rows: list[Row], counted: list[Row], concurrency: int) -> tuple[float, float]:
    flight, begin = 0, math.inf
    events = sorted([(r["t_send"], 1) for r in rows] + [(r["t_send"] + r["end_s"], 0) for r in rows])
    for at, sent in events:
        flight += 1 if sent else -1
        if flight >= 0.95 * concurrency:
            begin = at
            break
    last_send = max(r["t_send"] for r in rows)
    end = min(r["t_send"] + r["end_s"] for r in rows if r["t_send"] + r["end_s"] > last_send)
    return max(begin, min(r["t_send"] for r in counted)), end


def plain_row(rows: list[Row], concurrency: int) -> dict[str, float]:
    counted = [r for r in rows if not r["warmup"]]
    ok = [r for r in counted if r["status"] == "ok"]
    tpot = [(r["last_token_s"] - r["first_token_s"]) / (r["output_tokens"] - r["chunk_tokens"][0]) for r in ok]
    ends = [r["t_send"] + r["last_token_s"] for r in counted if not math.isnan(r["last_token_s"])]
    duration = max(ends) - min(r["t_send"] for r in counted)
    output, prompt = sum(r["output_tokens"] for r in ok), sum(r["prompt_tokens"] for r in ok)
    begin, end = steady_of(rows, counted, concurrency)
    came = sum(
        n
        for r in rows
        if r["status"] == "ok"
        for t, n in zip(r["chunk_s"], r["chunk_tokens"])
        if begin <= r["t_send"] + t < end
    )
    found = {
        "request_rate": 0.0, "concurrency": concurrency, "requests": len(counted), "failed": len(counted) - len(ok),
        "cancelled": 0,
        "duration_s": duration, "isl_mean": prompt / len(ok), "osl_mean": output / len(ok),
        "output_tok_s": output / duration, "output_tok_s_per_gpu": output / duration / 4,
        "output_tok_s_per_user": statistics.fmean(1 / t for t in tpot), "total_tok_s": (output + prompt) / duration,
        "steady_s": end - begin, "steady_output_tok_s": came / (end - begin),
    }  # fmt: skip
    latencies = {
        "ttft": [r["first_token_s"] for r in ok], "itl": [g for r in ok for g in gaps_of(r)],
        "tpot": tpot, "e2e": [r["last_token_s"] for r in ok],
        "ttft_sched": [r["first_token_s"] - min(r["scheduled_s"], 0.0) for r in ok],
        "e2e_sched": [r["last_token_s"] - min(r["scheduled_s"], 0.0) for r in ok],
    }  # fmt: skip
    latencies |= {
        "ttfb": [r["first_byte_s"] for r in ok], "ttfo": [r["first_visible_s"] for r in ok],
        "icl": [now - before for r in ok for before, now in zip(r["chunk_s"], r["chunk_s"][1:])],
    }  # fmt: skip
    steady = [r for r in ok if begin <= r["t_send"] < end]
    inside = {
        "ttft": [r["first_token_s"] for r in steady], "itl": [g for r in steady for g in gaps_of(r)],
        "tpot": [t for r, t in zip(ok, tpot) if begin <= r["t_send"] < end],
        "e2e": [r["last_token_s"] for r in steady],
    }  # fmt: skip
    for name, values in inside.items():
        found |= {f"steady_{name}_p{p}_ms": linear(values, p) * 1e3 for p in (50, 99)}
    for name, values in latencies.items():
        found[f"{name}_mean_ms"] = statistics.fmean(values) * 1e3
        found |= {f"{name}_p{p}_ms": linear(values, p) * 1e3 for p in (50, 90, 99)}
    return found


def plain_balance(experts: ExpertCounts, begin: float, end: float) -> tuple[float, float]:
    per_gpu = experts.placement.shape[2] // experts.ep_size
    held = experts.placement[0].tolist()
    weighted, weight, total = 0.0, 0.0, {}
    for (opened, closed), window in zip(experts.times.tolist(), experts.counts.tolist()):
        if opened >= end or closed <= begin:
            continue
        for layer, counts in enumerate(window):
            gpus = [0.0] * experts.ep_size
            for slot, expert in enumerate(held[layer]):
                gpus[slot // per_gpu] += counts[expert] / held[layer].count(expert)
            weighted += sum(gpus) * statistics.fmean(gpus) / max(gpus)
            weight += sum(gpus)
            total[layer] = [a + b for a, b in zip(total.get(layer, [0.0] * experts.ep_size), gpus)]
    return weighted / weight, max(max(gpus) / statistics.fmean(gpus) for gpus in total.values())


def by_point(folder: Path) -> dict[int, list[Row]]:
    points: dict[int, list[Row]] = {}
    for row in pq.read_table(folder / records.REQUESTS).to_pylist():
        points.setdefault(row["point"], []).append(row)
    return points


def test_every_column_of_the_sweep(folder: Path) -> None:
    sweep = read_sweep(folder).to_dict("records")
    experts = read_experts(folder / records.EXPERTS)
    points = by_point(folder)
    assert len(sweep) == len(points) == 4
    for row, rows in zip(sweep, (points[index] for index in sorted(points))):
        expected = plain_row(rows, rows[0]["concurrency"])
        counted = [r for r in rows if not r["warmup"]]
        end = max(r["t_send"] + r["last_token_s"] for r in counted if not math.isnan(r["last_token_s"]))
        begin = min(r["t_send"] for r in counted)
        expected["balancedness_mean"], expected["imbalance_max"] = plain_balance(experts, begin, end)
        others = {"power_w", "output_tok_s_per_w", "repeat", *SWEEP_TEXTS}  # of no request
        assert set(expected) == set(SWEEP_COLUMNS) - others
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_goodput(folder: Path) -> None:
    run, points = Run(folder), by_point(folder)
    for (concurrency, good), index in zip(goodputs(run, run.slo), sorted(points), strict=True):
        counted = [r for r in points[index] if not r["warmup"]]
        kept = [
            r
            for r in counted
            if r["status"] == "ok"
            and r["first_token_s"] <= 0.150
            and (r["last_token_s"] - r["first_token_s"]) / (r["output_tokens"] - 1) <= 0.100
        ]
        duration = plain_row(points[index], concurrency)["duration_s"]
        assert good.share == pytest.approx(len(kept) / len(counted))
        assert good.req_s == pytest.approx(len(kept) / duration)
        assert good.tok_s == pytest.approx(sum(r["output_tokens"] for r in kept) / duration)
