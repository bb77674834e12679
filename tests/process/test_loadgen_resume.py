"""A sweep that is cut off and taken up again, the gate a point must pass, and a server that goes away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.unit.loadgen_server import ScriptedServer, delta, hang, reply, stream, tokens
from toolkit import point_files
from toolkit.analysis import Run
from toolkit.analysis.levels import run_levels
from toolkit.loadgen.__main__ import main
from toolkit.records.requests import read_requests
from toolkit.records.status import read_status
from toolkit.records.sweep import read_sweep


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer().running() as running:
        running.behaviours = [tokens(gap_s=0.001)]
        yield running


def words(server: ScriptedServer, out: Path, *more: str) -> list[str]:
    own = ["osl=3", "max_client_verdict=client_limited", "warmup_requests=1", "num_requests=4"]
    return [f"url={server.url}", "model=demo", f"out={out}", *own, *more]


def states(out: Path) -> list[str]:
    return [point.state for point in read_status(out).points]


def kill_in_point(server: ScriptedServer, argv: list[str], bodies: int) -> None:
    """Starts a sweep and ends it with SIGKILL when the server has seen so many requests."""
    with subprocess.Popen([sys.executable, "-m", "toolkit.loadgen", *argv], stderr=subprocess.DEVNULL) as process:
        while len(server.bodies) < bodies:
            assert process.poll() is None
            signal.sigtimedwait([], 0.01)
        process.kill()


def test_a_killed_sweep_goes_on_where_it_was(
    server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a killed sweep had finished is neither lost nor sent again; the rest is what it would have sent."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    points = "concurrency=[1,2,3]"
    assert main(words(server, whole, points)) == 0
    expected, server.bodies = server.bodies, []
    server.behaviours = [*[tokens(gap_s=0.001)] * 10, hang]
    kill_in_point(server, words(server, cut, points), bodies=12)
    assert states(cut) == ["done", "done", "running"]
    assert len(Run(cut).requests) == 10, "rows of finished points are there, although the sweep never ended"
    kept = read_requests(cut)
    server.behaviours, server.bodies = [tokens(gap_s=0.001)], []
    caplog.set_level("INFO")
    assert main(words(server, cut, points, "resume=true", "attempt=2")) == 0
    assert "2 done, 1 missing" in caplog.text
    status, rows = read_status(cut), read_requests(cut)
    assert status.state == "done" and states(cut) == ["done"] * 3
    assert [point.attempt for point in status.points] == [1, 1, 2]
    assert rows.groupby("point").size().tolist() == [5, 5, 5]
    pd.testing.assert_frame_equal(rows[:10], kept)
    assert read_sweep(cut)["concurrency"].tolist() == [1, 2, 3]
    assert sorted(map(str, server.bodies)) == sorted(map(str, expected[10:])), "the same prompts and seeds"
    assert main(words(server, cut, points, "resume=true")) == 0
    assert len(server.bodies) == 5, "nothing is left to do"


def test_a_sweep_of_the_first_version_goes_on(server: ScriptedServer, tmp_path: Path) -> None:
    """Rows were kept without ``cancelled``, those requests being among the failed ones."""
    server.behaviours = [*[tokens(gap_s=0.001)] * 4, tokens(50, gap_s=0.02), tokens(gap_s=0.001)]
    load = ["cancel_fraction=1", "cancel_after_s=0.5"]
    assert main(words(server, tmp_path, *load, "concurrency=1")) == 0
    (file,) = (tmp_path / point_files.FOLDER).glob("*.parquet")
    table = pq.read_table(file)
    meta = json.loads(table.schema.metadata[point_files.META])
    assert (meta["row"]["failed"], meta["row"].pop("cancelled")) == (0, 1)
    meta["row"]["failed"] = 1
    pq.write_table(table.replace_schema_metadata({point_files.META: json.dumps(meta)}), file)
    assert main(words(server, tmp_path, *load, "concurrency=[1,2]", "resume=true")) == 0
    sweep = read_sweep(tmp_path)
    assert sweep[["requests", "failed", "cancelled"]].to_numpy().tolist() == [[4, 0, 1], [4, 0, 0]]


def test_what_did_not_end_well_is_run_again_and_told_apart(
    server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, boom = tokens(gap_s=0.001), reply(500, "boom", "text/plain")
    short = stream(delta("one", finish="stop"), b"data: [DONE]\n\n")
    server.behaviours = [*[good] * 5, *[boom] * 5, *[good] * 4, boom, *[short] * 5, good]
    assert main(words(server, tmp_path, "concurrency=[1,2,3,4]")) == 1
    assert states(tmp_path) == ["done", "failed", "invalid", "invalid"]
    sweep = read_sweep(tmp_path)
    assert sweep["state"].tolist() == ["done", "failed", "invalid", "invalid"]
    assert "1 of 4 requests failed, more than max_failed_share=0.01" in sweep["reason"][2]
    assert "4 of 4 answers are not as long as asked" in sweep["reason"][3]
    run = Run(tmp_path)
    assert [point.valid for point in run.points] == [True, True, False, False]
    assert run_levels(run)["concurrency"].tolist() == [1, 2]
    sent, server.behaviours = len(server.bodies), [good]
    caplog.set_level("INFO")
    assert main(words(server, tmp_path, "concurrency=[1,2,3,4,5]", "resume=true")) == 0
    assert "1 done, 2 invalid, 1 failed, 1 missing" in caplog.text
    assert states(tmp_path) == ["done"] * 5
    assert len(server.bodies) - sent == 4 * 5
    assert len(list((tmp_path / point_files.FOLDER / point_files.SUPERSEDED).iterdir())) == 3, "earlier tries stay"


def test_a_folder_holds_one_kind_of_load(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(server, tmp_path, "concurrency=1")) == 0
    assert main(words(server, tmp_path, "concurrency=2")) == 2
    assert "resume=true" in capsys.readouterr().err
    assert main(words(server, tmp_path, "concurrency=2", "resume=true", "temperature=0.5")) == 2
    assert "temperature=0.0 there, 0.5 now" in capsys.readouterr().err
    other_keys = ["concurrency=2", "resume=true", "timeout_s=99", "workers=1", "slo_ttft_ms=500"]
    assert main(words(server, tmp_path, *other_keys)) == 0
    status = read_status(tmp_path)
    assert [(p.concurrency, p.state, p.good_share) for p in status.points] == [(1, "done", 1.0), (2, "done", 1.0)]
    assert read_requests(tmp_path)["point"].unique().tolist() == [0, 1]


def test_repeats_are_passes_over_the_sweep(server: ScriptedServer, tmp_path: Path) -> None:
    assert main(words(server, tmp_path, "concurrency=[1,2]", "repeat=3")) == 0
    sweep = read_sweep(tmp_path)
    assert sweep["concurrency"].tolist() == [1, 2] * 3
    assert sweep["repeat"].tolist() == [0, 0, 1, 1, 2, 2]
    levels = run_levels(Run(tmp_path))
    assert levels["repeats"].tolist() == [3, 3]
    assert (levels["ttft_p50_ms_low"] < levels["ttft_p50_ms_high"]).all()


def test_a_server_that_dies_cancels_its_point(tmp_path: Path) -> None:
    with ScriptedServer().running() as server:
        server.behaviours = [*[tokens(gap_s=0.001)] * 12, hang]
        argv = [word for word in words(server, tmp_path, "concurrency=[1,2,3]", "gone_s=0.5") if "requests" not in word]
        argv += ["num_requests=8", "warmup_requests=1"]
        process = subprocess.Popen([sys.executable, "-m", "toolkit.loadgen", *argv], stderr=subprocess.DEVNULL)
        while len(server.bodies) < 14:
            assert process.poll() is None
            signal.sigtimedwait([], 0.01)
    assert process.wait(30) == 4
    status = read_status(tmp_path)
    assert states(tmp_path) == ["done", "cancelled", "pending"]
    assert status.state == "failed" and "the server is gone" in status.reason
    rows = read_requests(tmp_path)
    assert (rows[rows["point"] == 1]["status"] == "ok").sum() == 3
    assert read_sweep(tmp_path)["concurrency"].tolist() == [1]


def test_a_server_that_says_it_has_failed_is_gone_at_once(server: ScriptedServer, tmp_path: Path) -> None:
    """Every request of the point fails within its time; what the server says of itself decides what that means."""
    from aiohttp import web

    class Failed(web.HTTPServiceUnavailable):
        def __init__(self, text: str) -> None:
            super().__init__(text='{"state": "failed", "error": "rank 2: out of memory"}')

    async def dies(request: web.Request, body: dict[str, object]) -> web.StreamResponse:
        server.health = Failed
        return await reply(503, "gone", "text/plain")(request, body)

    server.behaviours = [*[tokens(gap_s=0.001)] * 5, dies]
    assert main(words(server, tmp_path, "concurrency=[1,2,3]", "gone_s=600")) == 4
    assert states(tmp_path) == ["done", "cancelled", "pending"]
    assert "rank 2: out of memory" in read_status(tmp_path).reason


def test_a_restarted_server_makes_the_point_invalid(server: ScriptedServer, tmp_path: Path) -> None:
    async def restarts(request: object, body: dict[str, object]) -> object:
        server.metrics = "process_start_time_seconds 1.7e9\n"
        return await tokens(gap_s=0.001)(request, body)  # type: ignore[arg-type]

    server.metrics = "# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1.6e9\n"
    server.behaviours = [*[tokens(gap_s=0.001)] * 7, restarts]  # type: ignore[list-item]
    assert main(words(server, tmp_path, "concurrency=[1,2,3]")) == 1
    status = read_status(tmp_path)
    assert states(tmp_path) == ["done", "invalid", "done"]
    assert status.points[1].reason == "the server was restarted meanwhile"


def test_no_tokens_is_no_success(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [stream(delta("", finish="stop"), b"data: [DONE]\n\n")]
    assert main(words(server, tmp_path, "concurrency=1", "ignore_eos=false")) == 1
    (point,) = read_status(tmp_path).points
    assert point.state == "invalid" and "no token was generated" in point.reason


def test_invalid_points_are_shown_where_runs_are_compared(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from toolkit.analysis.__main__ import main as analysis

    good, boom = tokens(gap_s=0.001), reply(500, "boom", "text/plain")
    server.behaviours = [*[good] * 9, boom, good]
    assert main(words(server, tmp_path / "a", "concurrency=[1,2]")) == 1
    assert main(words(server, tmp_path / "b", "concurrency=[1,2]")) == 0
    capsys.readouterr()
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    for command in ("pareto", "compare"):
        assert analysis([command, *folders, "--out", str(tmp_path / "out")]) == 0
        assert "at concurrency 2 is invalid: 1 of 4 requests failed" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "out" / "pareto.csv")["concurrency"]) == {1, 2}
    assert len(pd.read_csv(tmp_path / "out" / "pareto.csv")) == 3
    (table,) = (path for path in (tmp_path / "out").glob("*__*.csv"))
    assert set(pd.read_csv(table)["concurrency"]) == {1}
