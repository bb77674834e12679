"""``python -m toolkit.loadgen`` against a real server: files, states, exit status, interruption."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.unit.loadgen_server import DONE, ScriptedServer, delta, event, hang, reply, stream, tokens
from toolkit import records
from toolkit.loadgen.__main__ import main


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer().running() as running:
        running.behaviours = [tokens(gap_s=0.001)]
        yield running


def words(server: ScriptedServer, out: Path, *more: str) -> list[str]:
    return [f"url={server.url}", "model=demo", f"out={out}", "osl=3", *more]


def test_a_sweep(server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert main(words(server, out, "concurrency=[1,3]", "num_gpus=2")) == 0
    requests, sweep, status = records.read_requests(out), records.read_sweep(out), records.read_status(out)
    assert (status.state, [p.state for p in status.points]) == ("done", ["done", "done"])
    assert requests.groupby("point")["warmup"].sum().tolist() == [1, 3], "as many as concurrency"
    assert requests.groupby("point").size().tolist() == [1 + 4, 3 + 6], "max(min_requests, 2 * concurrency) measured"
    assert set(requests["status"]) == {"ok"}
    assert set(requests["output_text"]) == {"w0 w1 w2 "}
    assert requests["prompt_id"].is_unique, "no prompt comes twice while there are others"
    assert requests["request_id"].is_unique
    assert set(requests["expected_output_tokens"]) == {3}
    assert sweep["concurrency"].tolist() == [1, 3]
    assert sweep["requests"].tolist() == [4, 6]
    assert sweep["failed"].tolist() == [0, 0]
    assert (sweep["osl_mean"] == 3).all()
    assert sweep["output_tok_s_per_gpu"].tolist() == pytest.approx(sweep["output_tok_s"] / 2, rel=1e-4)
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies)
    assert "TTFT p50" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["requests.parquet", "status.json", "sweep.csv"]


def test_concurrency_as_the_server_sees_it(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [tokens(gap_s=0.01)]
    assert main(words(server, tmp_path, "concurrency=4", "num_requests=20", "warmup_requests=4")) == 0
    assert server.open_at_arrival[:4] == [1, 2, 3, 4]
    assert max(server.open_at_arrival) == 4


def test_without_out_nothing_is_written(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"url={server.url}/v1/", "concurrency=1", "osl=2", "endpoint=completions", "dataset=random"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert set(server.paths) == {"/v1/completions"}
    assert {body["model"] for body in server.bodies} == {"demo"}, "the first that /v1/models lists"
    assert "output" in capsys.readouterr().out


def test_text_is_left_out_when_asked(server: ScriptedServer, tmp_path: Path) -> None:
    assert main(words(server, tmp_path, "concurrency=1", "record_text=false")) == 0
    assert set(records.read_requests(tmp_path)["output_text"]) == {""}


def test_a_point_where_everything_fails(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviours = [*[tokens()] * 5, *[reply(503, '{"error": {"message": "queue is full"}}')] * 6, tokens()]
    assert main(words(server, tmp_path, "concurrency=[1,2,3]")) == 1
    status, sweep = records.read_status(tmp_path), records.read_sweep(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("failed", ["done", "failed", "done"])
    assert status.points[1].reason == "4 of 4 requests failed, the first with: HTTP 503: queue is full"
    assert sweep["failed"].tolist() == [0, 4, 0]
    assert math.isnan(sweep["ttft_p50_ms"][1])
    assert sweep["ttft_p50_ms"][2] > 0
    assert "queue is full" in capsys.readouterr().out


def test_some_failures_do_not_fail_a_point(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [tokens(), reply(500, "boom", "text/plain"), tokens()]
    assert main(words(server, tmp_path, "concurrency=1", "num_requests=4")) == 0
    (point,) = records.read_status(tmp_path).points
    assert (point.state, point.reason) == ("done", "1 of 4 requests failed, the first with: HTTP 500: boom")
    requests = records.read_requests(tmp_path)
    assert requests["status"].tolist() == ["ok", "error", "ok", "ok", "ok"]
    assert records.read_sweep(tmp_path)["failed"].tolist() == [1]


def test_progress_goes_to_the_file(server: ScriptedServer, tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    assert main(words(server, tmp_path / "out", "concurrency=[1,2]", f"progress={file}")) == 0
    state = json.loads(file.read_text())
    assert state.pop("output_tok_s") > 0
    assert state.pop("elapsed_s") > 0
    assert state == {
        "points": 2, "point": 1, "concurrency": 2, "request_rate": 0.0, "phase": "done", "done": 6, "total": 6,
        "failed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_was_measured(
    server: ScriptedServer, tmp_path: Path, number: signal.Signals
) -> None:
    server.behaviours = [*[tokens()] * 6, hang]  # the first point's five; the second point's first
    argv = [sys.executable, "-m", "toolkit.loadgen", *words(server, tmp_path, "concurrency=[1,2,4]")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "point 2/3" in line:
                break
        while len(server.bodies) < 8:  # until both slots hang
            assert process.poll() is None
            signal.sigtimedwait([], 0.01)
        process.send_signal(number)
        assert process.wait(20) == 130
    status, requests = records.read_status(tmp_path), records.read_requests(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("cancelled", ["done", "cancelled", "pending"])
    assert requests.query("point == 0")["status"].tolist() == ["ok"] * 5
    assert sorted(requests.query("point == 1")["status"]) == ["cancelled", "cancelled", "ok"]
    assert records.read_sweep(tmp_path)["concurrency"].tolist() == [1], "an interrupted point has no figures"


def test_a_server_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["url=http://127.0.0.1:9", "model=demo", f"out={tmp_path}", "concurrency=[1,2]"]) == 1
    status = records.read_status(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("failed", ["pending", "pending"])
    assert "cannot be reached" in status.reason
    assert "cannot be reached" in caplog.text


def test_a_server_that_is_not_ready(server: ScriptedServer, tmp_path: Path) -> None:
    server.health = web.HTTPServiceUnavailable
    assert main(words(server, tmp_path)) == 1
    assert "not ready: /health answers 503" in records.read_status(tmp_path).reason
    assert server.bodies == []
    server.health = web.HTTPOk
    assert main(words(server, tmp_path, "concurrency=1")) == 0, "nothing was measured: the folder may be used again"
    assert records.read_status(tmp_path).state == "done"


def test_a_server_without_health(server: ScriptedServer, tmp_path: Path) -> None:
    server.health = web.HTTPNotFound
    assert main(words(server, tmp_path, "concurrency=1")) == 0


def test_a_model_that_is_not_served(server: ScriptedServer, tmp_path: Path) -> None:
    server.models = ["demo-a", "demo-b"]
    assert main(words(server, tmp_path)) == 1
    assert "it serves: demo-a, demo-b" in records.read_status(tmp_path).reason


def test_results_are_never_overwritten(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(server, tmp_path, "concurrency=1")) == 0
    before = (tmp_path / records.REQUESTS).read_bytes()
    assert main(words(server, tmp_path, "concurrency=1")) == 2
    assert "holds the results of a sweep already" in capsys.readouterr().err
    assert (tmp_path / records.REQUESTS).read_bytes() == before


def test_chunks_that_hide_tokens_are_reported(
    server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    total = event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 9}})
    server.behaviours = [stream(delta("abc"), delta("def", finish="stop"), total, DONE)]
    assert main(words(server, tmp_path, "concurrency=1")) == 0
    assert "in 4 of 4 requests the server counted other than one token a chunk" in caplog.text
    assert set(records.read_requests(tmp_path)["output_tokens"]) == {9}
