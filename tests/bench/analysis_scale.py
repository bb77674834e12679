"""What a large run costs to analyse: time and peak memory of loading and summarising up to a million requests.

    python -m tests.bench.analysis_scale [ROWS ...]

Each size is measured in a process of its own, so that peaks do not mix: ``Run(...).requests``, the sweep (every latency
percentile, throughput, steady state), goodput, and the report's warnings. The last line compares the cost of a row
between the smallest and the largest size: 1 is linear.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from toolkit import records
from toolkit.records.requests import requests_schema

SIZES = (62_500, 250_000, 1_000_000)
POINTS, TOKENS = 8, 32


def write_run(folder: Path, rows: int) -> None:
    """A closed loop of ``POINTS`` load points, 64 slots each, ``TOKENS`` tokens a request, a little text."""
    rng = np.random.default_rng(0)
    each = rows // POINTS
    with pq.ParquetWriter(folder / records.REQUESTS, requests_schema(), compression="zstd") as out:
        for point in range(POINTS):
            gaps = rng.gamma(20, 0.001, (each, TOKENS))
            gaps[:, 0] = 0.1 + 0.1 * rng.random(each)
            times = np.cumsum(gaps, axis=1)
            last = times[:, -1]
            sent = 1.76e9 + 1e5 * point + np.cumsum(np.full(each, float(last.mean()) / 64))
            constant = {
                "point": point, "concurrency": 64, "prompt_id": "p", "warmup": False, "status": "ok", "error": "",
                "http_status": 200, "scheduled_s": 0.0, "prompt_tokens": 100, "cached_tokens": 0,
                "output_tokens": TOKENS, "expected_output_tokens": TOKENS, "finish_reason": "length", "dp_rank": 0,
                "output_text": "a short answer " * 8,
            }  # fmt: skip
            offsets = np.arange(0, each * TOKENS + 1, TOKENS, dtype=np.int32)
            columns = {name: pa.array([value] * each) for name, value in constant.items()} | {
                "request_id": pa.array([f"{point}-{i}" for i in range(each)]),
                "t_send": pa.array(sent), "first_byte_s": pa.array(times[:, 0]), "end_s": pa.array(last),
                "first_token_s": pa.array(times[:, 0]), "last_token_s": pa.array(last),
                "chunk_s": pa.ListArray.from_arrays(offsets, times.ravel()),
                "chunk_tokens": pa.ListArray.from_arrays(offsets, np.ones(each * TOKENS, np.int32)),
            }  # fmt: skip
            schema = requests_schema()
            out.write_table(pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema))


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each stage and the peak resident memory, bytes, in this process."""
    from toolkit.analysis import Run
    from toolkit.analysis.findings import goodputs
    from toolkit.analysis.goodput import Slo
    from toolkit.analysis.trust import warnings

    found, run = {"import_bytes": peak()}, Run(folder)
    for name, stage in {
        "load_s": lambda run: run.requests,
        "sweep_s": lambda run: run.sweep,
        "goodput_s": lambda run: goodputs(run, Slo(ttft_ms=150, tpot_ms=21)),
        "warnings_s": warnings,
    }.items():
        begin = time.perf_counter()
        stage(run)
        found[name] = time.perf_counter() - begin
    return found | {"rows": len(run.requests), "peak_bytes": peak(), "cpu_s": time.process_time()}


def peak() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    found = []
    print(f"{'rows':>10} {'load s':>8} {'sweep s':>8} {'goodput s':>9} {'warnings s':>10} {'all s':>7} {'peak GB':>8}")
    for rows in [int(text) for text in sys.argv[1:]] or SIZES:
        with tempfile.TemporaryDirectory() as name:
            write_run(Path(name), rows)
            command = [sys.executable, "-m", "tests.bench.analysis_scale", "--measure", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout)
        row["all_s"] = sum(row[stage] for stage in ("load_s", "sweep_s", "goodput_s", "warnings_s"))
        found.append(row)
        print(
            f"{row['rows']:>10,} {row['load_s']:>8.2f} {row['sweep_s']:>8.2f} {row['goodput_s']:>9.2f} "
            f"{row['warnings_s']:>10.2f} {row['all_s']:>7.2f} {row['peak_bytes'] / 1e9:>8.2f}"
        )
    first, last = found[0], found[-1]
    times = (last["all_s"] / last["rows"]) / (first["all_s"] / first["rows"])
    grown = [(row["peak_bytes"] - row["import_bytes"]) / row["rows"] for row in (first, last)]
    print(
        f"cost of a row, {last['rows']:,} against {first['rows']:,}: time {times:.2f}, memory {grown[1] / grown[0]:.2f}"
    )


if __name__ == "__main__":
    main()
