"""A run's load points in the files that other tools write, so that what reads theirs reads ours.

Owns the names and units of those files. A figure goes under a name only where the definitions are the same
(metrics.py): vLLM's ``itl`` is our ICL, aiperf's ``inter_token_latency`` our TPOT. Cancelled requests are among the
failed ones there: aiperf counts its own so, and vLLM has none.

Sources: vLLM ``bench serve --save-result`` and sa-bench's file names (srt-slurm); aiperf's JSON Export Schema 1.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.analysis import metrics
from toolkit.analysis.chunks import chunks_of, gaps_of
from toolkit.records.files import replacing

if TYPE_CHECKING:
    import pandas as pd

    from toolkit.analysis.load import Run
    from toolkit.analysis.metrics import Floats
    from toolkit.analysis.sweep_table import LoadPoint

PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def vllm(run: Run, point: LoadPoint) -> tuple[str, dict[str, Any]]:
    """sa-bench's file name and vLLM's keys, per-request lists included (as with ``--save-detailed``)."""
    every, ok = metrics.measured(point.requests), metrics.succeeded(point.requests)
    begin, end = metrics.interval(point.requests)
    duration, tokens = end - begin, float(ok["output_tokens"].sum())
    total, rate = tokens + float(ok["prompt_tokens"].sum()), float(point.row["request_rate"])
    result: dict[str, Any] = {
        "date": datetime.fromtimestamp(begin, UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai", "model_id": run.settings["model"], "tokenizer_id": run.settings["model"],
        "num_prompts": len(every), "request_rate": rate if rate > 0 else "inf",
        "max_concurrency": point.concurrency, "duration": duration, "completed": len(ok),
        "failed": len(every) - len(ok), "total_input_tokens": int(ok["prompt_tokens"].sum()),
        "total_output_tokens": int(tokens), "request_throughput": len(ok) / duration,
        "output_throughput": tokens / duration, "total_token_throughput": total / duration,
        "benchmark_start_time_unix": begin, "benchmark_end_time_unix": end,
    }  # fmt: skip
    for name, seconds in (
        ("ttft", metrics.ttft_s(ok)), ("tpot", metrics.tpot_s(ok)), ("itl", metrics.icl_s(ok)),
        ("e2el", metrics.e2e_s(ok)),
    ):  # fmt: skip
        values = seconds[np.isfinite(seconds)] * 1e3
        if len(values):
            result |= {f"mean_{name}_ms": values.mean(), f"median_{name}_ms": np.median(values),
                       f"std_{name}_ms": values.std()}  # fmt: skip
            result |= {f"p{p}_{name}_ms": np.percentile(values, p) for p in (90, 95, 99)}
    result |= _per_request(every, begin)
    return f"results_concurrency_{point.concurrency}_gpus_{run.num_gpus or 0}.json", result


def _per_request(every: pd.DataFrame, begin: float) -> dict[str, Any]:
    """vLLM's lists: of a failed request TTFT 0 and no gaps; send times on a clock that begins with the point."""
    good = (every["status"] == "ok").to_numpy()
    gaps = gaps_of(chunks_of(every))
    lists: list[list[float]] = [[] for _ in range(len(every))]
    for row, gap in zip(gaps.owner.tolist(), (gaps.per_token * gaps.tokens).tolist(), strict=True):
        if good[row]:
            lists[row].append(gap)
    errors = every["error"].where(every["error"] != "", every["status"]).to_numpy()
    return {
        "input_lens": every["prompt_tokens"].to_numpy(), "itls": lists,
        "output_lens": np.where(good, every["output_tokens"].to_numpy(), 0),
        "ttfts": np.where(good, metrics.ttft_s(every), 0.0), "errors": np.where(good, "", errors),
        "start_times": every["t_send"].to_numpy(np.float64) - begin,
    }  # fmt: skip


def aiperf(run: Run, point: LoadPoint) -> tuple[str, dict[str, Any]]:
    """``profile_export_aiperf.json`` in a folder of the load point."""
    every, ok = metrics.measured(point.requests), metrics.succeeded(point.requests)
    begin, end = metrics.interval(point.requests)
    duration, tpot = end - begin, metrics.tpot_s(ok)
    prompt, output = (ok[name].to_numpy(np.float64) for name in ("prompt_tokens", "output_tokens"))
    found: dict[str, Any] = {
        "schema_version": "1.5",
        "start_time": datetime.fromtimestamp(begin, UTC).isoformat(),
        "end_time": datetime.fromtimestamp(end, UTC).isoformat(),
        "was_cancelled": False,
        "input_config": {"models": [run.settings["model"]], "concurrency": point.concurrency},
    }
    latencies = {
        "time_to_first_token": metrics.ttft_s(ok), "time_to_first_output_token": metrics.ttfo_s(ok),
        "inter_token_latency": tpot, "inter_chunk_latency": metrics.icl_s(ok), "request_latency": metrics.e2e_s(ok),
    }  # fmt: skip
    found |= {name: _stats(seconds * 1e3, "ms") for name, seconds in latencies.items()}
    found["output_token_throughput_per_user"] = _stats(1 / tpot[tpot > 0], "tokens/sec/user")
    found |= {"input_sequence_length": _stats(prompt, "tokens"), "output_sequence_length": _stats(output, "tokens")}
    single = {
        "request_count": (len(ok), "requests"), "error_request_count": (len(every) - len(ok), "requests"),
        "request_throughput": (len(ok) / duration, "requests/sec"),
        "output_token_throughput": (output.sum() / duration, "tokens/sec"),
        "total_token_throughput": ((prompt.sum() + output.sum()) / duration, "tokens/sec"),
        "benchmark_duration": (duration, "sec"),
    }  # fmt: skip
    found |= {name: {"unit": unit, "avg": float(value)} for name, (value, unit) in single.items()}
    return f"concurrency_{point.concurrency}/profile_export_aiperf.json", found


def _stats(values: Floats, unit: str) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {"unit": unit}
    block = {"unit": unit, "avg": values.mean(), "min": values.min(), "max": values.max()}
    block |= {f"p{p}": value for p, value in zip(PERCENTS, np.percentile(values, PERCENTS), strict=True)}
    return block | {"std": values.std(ddof=len(values) > 1), "count": len(values), "sum": values.sum()}


FORMATS: dict[str, Callable[[Run, LoadPoint], tuple[str, dict[str, Any]]]] = {"vllm": vllm, "aiperf": aiperf}


def write(run: Run, form: str, out: Path) -> list[Path]:
    """A file for each load point that has requests; returns them.

    Raises:
        ValueError: the run holds no requests.
    """
    files = []
    for index, point in enumerate(run.points):
        if not len(metrics.succeeded(point.requests)):
            continue
        name, result = FORMATS[form](run, point)
        path = out / name
        if path in files:  # a repeated load point
            path = path.with_name(f"{path.stem}_{index}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "w") as file:
            json.dump(_plain(result), file, indent=1)
        files.append(path)
    if not files:
        raise ValueError(f"run={run.path} holds no request that ended well: there is nothing to write as {form}")
    return files


def _plain(value: Any) -> Any:
    """numpy to JSON; NaN, which JSON has not, to null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [_plain(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
