"""Each warning is raised by what it warns of, and by nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.unit.analysis_run import EPOCH, failure, point_records, record
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.steady import held_concurrency, steady_interval
from toolkit.analysis.trust import warnings
from toolkit.records.files import write_json
from toolkit.records.requests import RequestRecord, write_requests
from toolkit.records.steps import StepRecord, steps_path
from toolkit.records.streams import open_rows


def good_point(requests: int = 160, concurrency: int = 4) -> list[RequestRecord]:
    return point_records(np.random.default_rng(1), 0, concurrency, EPOCH, requests)


def found(folder: Path, rows: list[RequestRecord]) -> str:
    write_requests(folder, rows)
    return "\n".join(line for line in warnings(Run(folder)) if not line.startswith(("missing", "sweep.csv lacks")))


def test_a_sound_point_has_no_warning(tmp_path: Path) -> None:
    assert found(tmp_path, good_point()) == ""


def test_failed_and_cancelled_are_told_apart(tmp_path: Path) -> None:
    kinds = ("error", "timeout", "cancelled", "interrupted")
    bad = [failure(concurrency=4, t_send=EPOCH + 1 + i, status=kind) for i, kind in enumerate(kinds)]
    text = found(tmp_path, [*good_point(), *bad])
    assert "2 of 163 requests failed (1 error, 1 timeout)" in text, "what was interrupted is in no count"


def test_what_was_cancelled_as_asked_is_no_warning(tmp_path: Path) -> None:
    assert found(tmp_path, [*good_point(), failure(concurrency=4, t_send=EPOCH - 1, status="cancelled")]) == ""


def test_few_requests(tmp_path: Path) -> None:
    assert "too few requests for p99 (under 100" in found(tmp_path, good_point(60))


def test_one_wave_is_no_steady_state(tmp_path: Path) -> None:
    rows = [record(request_id=str(i), concurrency=4, t_send=EPOCH + i / 1e3) for i in range(4)]
    assert "no steady state" in found(tmp_path, rows)


def test_throughput_that_drifts(tmp_path: Path) -> None:
    rows, at = [], EPOCH
    for i in range(120):
        slow = 1 + i / 40
        rows.append(
            record(
                request_id=str(i), t_send=at, chunk_s=[0.1 * slow, 0.2 * slow, 0.4 * slow], first_token_s=0.1 * slow,
                last_token_s=0.4 * slow, end_s=0.41 * slow,
            )
        )  # fmt: skip
        at += rows[-1].end_s + 1e-6
    assert "throughput drifts in the steady state" in found(tmp_path, rows)


def test_a_client_that_holds_less_than_asked(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, concurrency=8) for row in good_point(concurrency=4)]
    rows += [
        record(request_id=f"x{i}", concurrency=8, t_send=EPOCH + 0.5 + i / 1e4, warmup=True, end_s=0.3)
        for i in range(4)
    ]
    assert "the client held" in found(tmp_path, rows)


def test_requests_sent_late(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, scheduled_s=-0.3) for row in good_point()]
    assert "requests were sent late (p99 300 ms after their time)" in found(tmp_path, rows)


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    rows = good_point()
    for row in rows[80:]:
        row.t_send -= 2.0
    assert "the client's clock was set back" in found(tmp_path, rows)


def test_a_rank_whose_clock_was_set_back(tmp_path: Path) -> None:
    steps = [StepRecord(i, EPOCH + i, 0.5, 2, 1, 1, 0, 1, 0, 0, 64, 0) for i in range(6)]
    steps[4] = steps[4]._replace(t_begin=EPOCH + 1)
    (tmp_path / records.STEPS).mkdir()
    with open_rows(steps_path(tmp_path, 0), StepRecord) as write:
        write(steps)
    assert "the clock of DP rank 2 was set back 1 times" in found(tmp_path, good_point())


def test_lengths_and_counts_that_differ(tmp_path: Path) -> None:
    rows = good_point()
    rows[10].output_tokens = 20
    text = found(tmp_path, rows)
    assert "1 of 160 answers are not as long as asked" in text
    assert "1 answers whose chunks do not add up to their usage" in text


def test_an_slo_that_is_no_time_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / records.CONFIG).write_text("load: {slo_ttft_ms: fast, slo_tpot_ms: 50}\n")
    assert "load.slo_ttft_ms='fast' is no time" in found(tmp_path, good_point())
    assert Run(tmp_path).slo.tpot_ms == 50


def test_the_steady_state_by_hand(tmp_path: Path) -> None:
    """Two slots, back to back: A 0-4, B 1-5, C 4-8, D 5-9; warm-up is A."""
    spans = [(0, 4, True), (1, 4, False), (4, 4, False), (5, 4, False)]
    rows = [
        record(request_id=str(i), t_send=EPOCH + begin, end_s=float(length), last_token_s=float(length), warmup=warm,
               concurrency=2)
        for i, (begin, length, warm) in enumerate(spans)
    ]  # fmt: skip
    write_requests(tmp_path, rows)
    requests = Run(tmp_path).requests
    assert steady_interval(requests, 2) == (EPOCH + 1, EPOCH + 8)
    assert held_concurrency(requests, EPOCH, EPOCH + 9) == pytest.approx(16 / 9)
    assert np.isnan(steady_interval(requests, 4)[0])


def test_attempts_that_differ_are_told(tmp_path: Path) -> None:
    changed = {"git.commit": ["aaa", "bbb"], "host.name": ["node1", "node7"]}
    entries = [{"attempt": 1, "changed": {}}, {"attempt": 2, "changed": changed}]
    write_json(tmp_path / records.MANIFEST, {"attempts": entries})
    write_requests(tmp_path, [record()])
    (line,) = [line for line in warnings(Run(tmp_path)) if line.startswith("attempt")]
    assert line.endswith("the one before: git.commit: aaa -> bbb; host.name: node1 -> node7")
