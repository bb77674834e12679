"""The formulas of toolkit.analysis.metrics against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.analysis_run import EPOCH, failure, record
from toolkit.analysis import metrics
from toolkit.analysis.goodput import Slo, goodput
from toolkit.analysis.sweep_row import sweep_row
from toolkit.records.requests import RequestRecord, read_requests, requests_schema, write_requests
from toolkit.records.sweep import SWEEP_COLUMNS


def frame(*rows: RequestRecord) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in rows], columns=requests_schema().names)


def test_a_chunk_of_three_tokens_counts_three_times_with_a_third_of_its_gap() -> None:
    requests = frame(record(chunk_s=[0.1, 0.2, 0.5], chunk_tokens=[1, 1, 3], last_token_s=0.5))
    assert metrics.itl_s(requests) == pytest.approx([0.1, 0.1, 0.1, 0.1])


def test_gaps_do_not_reach_from_one_request_into_the_next() -> None:
    one = record(chunk_s=[0.1, 0.2], chunk_tokens=[1, 1])
    two = record(chunk_s=[0.7, 1.1], chunk_tokens=[1, 1])
    assert metrics.itl_s(frame(one, failure(), two)) == pytest.approx([0.1, 0.4])


def test_a_chunk_without_tokens_lends_its_gap_to_the_next() -> None:
    requests = frame(record(chunk_s=[0.0, 0.1, 0.2, 0.6], chunk_tokens=[0, 1, 0, 2]))
    assert metrics.itl_s(requests) == pytest.approx([0.25, 0.25])


def test_chunks_of_unequal_length_are_refused_by_name() -> None:
    requests = frame(record(), record(request_id="bad", chunk_s=[0.1], chunk_tokens=[1, 1]))
    with pytest.raises(ValueError, match="request_id=bad"):
        metrics.itl_s(requests)


def test_tpot_divides_by_the_tokens_after_the_first_chunk() -> None:
    requests = frame(
        record(first_token_s=0.1, last_token_s=0.5, output_tokens=5, chunk_tokens=[1, 1, 3]),
        record(first_token_s=0.1, last_token_s=0.5, output_tokens=6, chunk_tokens=[2, 1, 3]),
    )
    assert metrics.tpot_s(requests) == pytest.approx([0.4 / 4, 0.4 / 4])


def test_a_single_token_has_a_ttft_and_no_tpot() -> None:
    requests = frame(record(output_tokens=1, chunk_s=[0.1], chunk_tokens=[1], last_token_s=0.1))
    row = sweep_row(requests, 1, 1)
    assert row["ttft_p50_ms"] == pytest.approx(100)
    assert row["e2e_p99_ms"] == pytest.approx(100)
    assert all(math.isnan(row[name]) for name in ("itl_mean_ms", "tpot_p50_ms", "output_tok_s_per_user"))


def test_sweep_row_by_hand() -> None:
    requests = frame(
        record(warmup=True, t_send=EPOCH - 1, prompt_tokens=999, first_token_s=9.0),
        record(t_send=EPOCH, first_token_s=0.1, last_token_s=0.5, prompt_tokens=10),  # TPOT 0.1
        record(t_send=EPOCH + 1, first_token_s=0.3, last_token_s=1.1, prompt_tokens=20),  # TPOT 0.2
        failure(t_send=EPOCH + 0.5),
        failure(t_send=EPOCH + 0.5, status="timeout"),
        failure(t_send=EPOCH + 0.6, status="cancelled"),
        failure(t_send=EPOCH + 0.7, status="interrupted"),
    )
    row = sweep_row(requests, concurrency=2, num_gpus=4, balancedness_mean=0.5, imbalance_max=3.0)
    assert tuple(row) == SWEEP_COLUMNS
    expected = {
        "concurrency": 2, "requests": 5, "failed": 2, "cancelled": 1, "duration_s": 2.1, "isl_mean": 15, "osl_mean": 5,
        "ttft_mean_ms": 200, "ttft_p50_ms": 200, "ttft_p90_ms": 280, "ttft_p99_ms": 298, "e2e_mean_ms": 800,
        "tpot_mean_ms": 150, "output_tok_s": 10 / 2.1, "output_tok_s_per_gpu": 10 / 2.1 / 4,
        "output_tok_s_per_user": (1 / 0.1 + 1 / 0.2) / 2, "total_tok_s": 40 / 2.1,
        "balancedness_mean": 0.5, "imbalance_max": 3.0,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_goodput_judges_what_was_neither_given_up_nor_cut_off() -> None:
    ends = [failure(), failure(status="cancelled"), failure(status="cancelled"), failure(status="interrupted")]
    found = goodput(frame(record(), record(), record(first_token_s=9.0), *ends), Slo(ttft_ms=200))
    assert (found.share, found.by_bound) == (2 / 4, {"ttft": 2 / 4}), "two good, one late, one failed"


def test_rows_of_the_first_version_tell_what_was_cut_off_by_its_error(tmp_path: Path) -> None:
    errors = ("given up after 1 s, as cancel_fraction asks", "the run was interrupted")
    write_requests(tmp_path, [failure(status="cancelled", error=error) for error in errors])
    assert read_requests(tmp_path)["status"].tolist() == ["cancelled", "interrupted"]
    assert read_requests(tmp_path, ["point", "status"]).columns.tolist() == ["point", "status"]


def test_a_failure_that_had_begun_to_answer_is_in_the_duration_but_in_no_latency() -> None:
    broken = record(status="error", error="stream broke", t_send=EPOCH + 1, first_token_s=5.0, last_token_s=8.0)
    row = sweep_row(frame(record(), broken), 1, 1)
    assert row["duration_s"] == pytest.approx(9.0)
    assert row["ttft_p99_ms"] == pytest.approx(100)
    assert row["output_tok_s"] == pytest.approx(5 / 9)


@pytest.mark.parametrize("rows", [(), (failure(),), (record(warmup=True),)], ids=["none", "all failed", "warm-up"])
def test_a_point_without_a_result_is_nan_not_a_crash(rows: tuple[RequestRecord, ...]) -> None:
    row = sweep_row(frame(*rows), 1, 1)
    measured = [r for r in rows if not r.warmup]
    assert (row["requests"], row["failed"]) == (len(measured), len(measured))
    assert math.isnan(row["output_tok_s"]) and math.isnan(row["ttft_p50_ms"]) and math.isnan(row["itl_p99_ms"])


def test_the_row_is_the_same_after_a_trip_through_parquet(tmp_path) -> None:
    rows = [record(), failure(), record(t_send=EPOCH + 2, chunk_s=[0.2, 0.4], chunk_tokens=[4, 1])]
    write_requests(tmp_path, rows)
    read = sweep_row(read_requests(tmp_path), 1, 1)
    assert read == pytest.approx(sweep_row(frame(*rows), 1, 1), nan_ok=True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 2), st.integers(1, 5)), min_size=2, max_size=30))
def test_itl_keeps_every_token_and_all_of_the_time(chunks: list[tuple[float, int]]) -> None:
    times = np.cumsum([gap for gap, _ in chunks])
    tokens = [count for _, count in chunks]
    requests = frame(
        record(
            chunk_s=times.tolist(), chunk_tokens=tokens, output_tokens=sum(tokens), first_token_s=float(times[0]),
            last_token_s=float(times[-1]),
        )
    )  # fmt: skip
    itl = metrics.itl_s(requests)
    assert len(itl) == sum(tokens[1:])
    assert itl.sum() == pytest.approx(times[-1] - times[0])
    assert itl.mean() == pytest.approx(metrics.tpot_s(requests)[0])  # one request: the mean gap is its TPOT
