"""Benchmark results of vLLM, SGLang and aiperf -> requests, or the tool's own summary where it kept no requests.

Owns the field names of the three formats. Per-request rows go through our definitions (metrics.py); a summary is
carried over under the figure of ours that it equals, and left out where none does:
vLLM's and SGLang's ``tpot`` is our TPOT, their ``itl`` counts chunks; aiperf's ``inter_token_latency`` is our TPOT.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.analysis.foreign.parts import Imported, chunks, request

CHUNK_NOTE = "ITL of a summary counts gaps between chunks, not tokens"
START_NOTE = "the tool does not keep when requests were sent: durations and rates are its own, not recomputed"


def vllm(path: Path, into: Imported) -> None:
    """``vllm bench serve --save-result``: one JSON object, or a list of them (``--append-result``: one a line)."""
    for result in _objects(path):
        into.model = into.model or str(result.get("model_id", ""))
        starts = result.get("start_times")
        _serving(result, into, starts if isinstance(starts, list) else None)


def sglang(path: Path, into: Imported) -> None:
    """``sglang bench_serving --output-file``: one JSON object a line."""
    for result in _objects(path):
        info = result.get("server_info")
        into.model = into.model or str(info.get("model_path", "") if isinstance(info, dict) else "")
        _serving(result, into, None)


def aiperf(path: Path, into: Imported) -> None:
    """``profile_export.jsonl`` (one request a line), or ``profile_export_aiperf.csv`` (the summary)."""
    if path.suffix == ".csv":
        _aiperf_csv(path, into)
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [line for line in lines if "profiling" in str(line["metadata"]["benchmark_phase"]).lower()]
    if not lines:
        raise ValueError(f"file={path} holds no request of the profiling phase")
    spans = [(line["metadata"]["request_start_ns"], line["metadata"]["request_end_ns"]) for line in lines]
    concurrency, point = most_at_once(spans), into.point()
    into.note("aiperf's records do not name the concurrency: it is the most requests seen in flight at once")
    for index, (line, (start, end)) in enumerate(zip(lines, spans, strict=True)):
        into.requests.append(_aiperf_request(line, point, concurrency, index, start, end))


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """The largest number of (begin, end) spans that overlap."""
    events = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    most = level = 0
    for _, change in events:
        level += change
        most = max(most, level)
    return most


def _aiperf_request(line: dict[str, Any], point: int, concurrency: int, index: int, start: int, end: int) -> Any:
    metadata, error = line["metadata"], line.get("error")
    tokens = int(_metric(line, "output_sequence_length", _metric(line, "output_token_count", 0)))
    known: dict[str, Any] = {
        "request_id": str(metadata.get("x_request_id") or f"{point}-{index}"), "t_send": start / 1e9,
        "end_s": (end - start) / 1e9, "prompt_tokens": int(_metric(line, "input_sequence_length", 0)),
    }  # fmt: skip
    if error or metadata.get("was_cancelled"):
        status = "cancelled" if metadata.get("was_cancelled") else "error"
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error or "cancelled")
        return request(point, concurrency, index, status=status, error=text, **known)
    ttft = _metric(line, "time_to_first_token", math.nan) / 1e3
    last = _metric(line, "request_latency", math.nan) / 1e3
    gaps = line["metrics"].get("inter_chunk_latency", {}).get("value")
    if not isinstance(gaps, list):
        gaps = [last - ttft] if last > ttft else []
    times, counts = chunks(ttft, [gap / 1e3 for gap in gaps] if "inter_chunk_latency" in line["metrics"] else gaps,
                           tokens)  # fmt: skip
    return request(
        point, concurrency, index, first_token_s=ttft, last_token_s=last if math.isfinite(last) else ttft,
        output_tokens=tokens, chunk_s=times, chunk_tokens=counts, **known,
    )  # fmt: skip


def _metric(line: dict[str, Any], name: str, otherwise: float) -> float:
    """A metric in ms or tokens."""
    entry = line["metrics"].get(name)
    if not isinstance(entry, dict):
        return otherwise
    value = float(entry["value"])
    return value * {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "sec": 1e3, "s": 1e3}.get(str(entry.get("unit")), 1.0)


def _serving(result: dict[str, Any], into: Imported, starts: list[float] | None) -> None:
    """One load point of vLLM or SGLang, which share their field names."""
    concurrency = int(result.get("max_concurrency") or result.get("max_concurrent_requests") or 0)
    detailed = all(isinstance(result.get(name), list) for name in ("ttfts", "itls", "input_lens", "output_lens"))
    point = into.point()
    if detailed and starts is not None:
        errors = result.get("errors") or [""] * len(result["ttfts"])
        columns = (result["ttfts"], result["itls"], result["input_lens"], result["output_lens"], errors, starts)
        concurrency = concurrency or len(starts)
        for index, values in enumerate(zip(*columns, strict=True)):
            into.requests.append(_serving_request(point, concurrency, index, *values))
        into.note("vLLM keeps send times on a clock of its own: they say what came when, not at which date")
        return
    into.note(START_NOTE)
    into.note(CHUNK_NOTE)
    completed = int(result["completed"])
    failed = int(result.get("failed") or sum(bool(e) for e in result.get("errors") or []))
    row: dict[str, Any] = {
        "concurrency": concurrency, "requests": completed + failed, "failed": failed,
        "duration_s": float(result["duration"]), "output_tok_s": float(result["output_throughput"]),
        "total_tok_s": float(result.get("total_token_throughput", result.get("total_throughput", math.nan))),
        "isl_mean": result["total_input_tokens"] / max(completed, 1),
        "osl_mean": result["total_output_tokens"] / max(completed, 1),
    }  # fmt: skip
    theirs = {"ttft": ("ttft",), "tpot": ("tpot",), "itl": ("itl",), "e2e": ("e2el", "e2e_latency")}
    for ours, names in theirs.items():
        for stat, word in (("mean", "mean"), ("p50", "median"), ("p90", "p90"), ("p99", "p99")):
            found = [result[f"{word}_{name}_ms"] for name in names if result.get(f"{word}_{name}_ms") is not None]
            row[f"{ours}_{stat}_ms"] = float(found[0]) if found else math.nan
    median = row["tpot_p50_ms"]
    row["output_tok_s_per_user"] = 1e3 / median if median > 0 else math.nan
    into.note("tok/s of a user is 1000 / median TPOT where only a summary was kept")
    into.rows[point] = row


def _serving_request(
    point: int, concurrency: int, index: int, ttft: float, gaps: list[float], isl: int, osl: int, error: str, at: float
) -> Any:
    if error or not ttft:
        return request(point, concurrency, index, status="error", error=str(error or "no token"), t_send=at,
                       prompt_tokens=int(isl))  # fmt: skip
    times, counts = chunks(ttft, gaps, int(osl))
    last = float(ttft + sum(gaps))
    return request(
        point, concurrency, index, t_send=at, first_token_s=float(ttft), last_token_s=last, end_s=last,
        prompt_tokens=int(isl), output_tokens=int(osl), chunk_s=times, chunk_tokens=counts,
    )  # fmt: skip


def _aiperf_csv(path: Path, into: Imported) -> None:
    stats: dict[str, dict[str, str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        header: list[str] = []
        for cells in csv.reader(file):
            if cells[:1] == ["Metric"]:
                header = cells
            elif cells and header and cells[0] and len(cells) == len(header):
                stats[cells[0].split(" (")[0]] = dict(zip(header[1:], cells[1:], strict=True))
    if "Request Latency" not in stats:
        raise ValueError(f"file={path} is not aiperf's profile_export_aiperf.csv: it has no Request Latency")

    def figure(name: str, stat: str) -> float:
        text = stats.get(name, {}).get(stat, "")
        return float(text.replace(",", "")) if text else math.nan

    def single(name: str) -> float:
        value = figure(name, "Value")
        return value if math.isfinite(value) else figure(name, "avg")

    requests, failed = single("Request Count"), single("Error Request Count")
    failed = failed if math.isfinite(failed) else 0.0
    row: dict[str, Any] = {
        "concurrency": 0, "requests": int(requests + failed), "failed": int(failed),
        "duration_s": single("Benchmark Duration"), "isl_mean": figure("Input Sequence Length", "avg"),
        "osl_mean": figure("Output Sequence Length", "avg"),
        "output_tok_s": single("Output Token Throughput"),
        "output_tok_s_per_user": figure("Output Token Throughput Per User", "avg"),
    }  # fmt: skip
    for ours, name in (("ttft", "Time to First Token"), ("tpot", "Inter Token Latency"), ("e2e", "Request Latency")):
        row |= {f"{ours}_{stat}_ms": figure(name, "avg" if stat == "mean" else stat)
                for stat in ("mean", "p50", "p90", "p99")}  # fmt: skip
    into.note("aiperf's summary does not name the concurrency: 0 stands for unknown")
    into.rows[into.point()] = row


def _objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file: one object, a list, or one a line."""
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = [json.loads(line) for line in text.splitlines() if line.strip()]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, dict) for item in values):
        raise TypeError("JSON objects are expected")
    return values
