"""``python -m toolkit.loadgen`` against a real server: files, states, exit status, interruption."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.unit.loadgen_server import DONE, ScriptedServer, delta, event, hang, reply, stream, tokens
from toolkit import records
from toolkit.loadgen.__main__ import main
from toolkit.records.requests import read_requests
from toolkit.records.samples import read_server_metrics
from toolkit.records.status import read_status
from toolkit.records.sweep import read_sweep


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer().running() as running:
        running.behaviours = [tokens(gap_s=0.001)]
        yield running


# The client's own lateness, on a busy test machine, must not make these points invalid.
OWN = ("osl=3", "max_client_verdict=client_limited")


def words(server: ScriptedServer, out: Path, *more: str) -> list[str]:
    return [f"url={server.url}", "model=demo", f"out={out}", *OWN, *more]


def test_a_sweep(server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert main(words(server, out, "concurrency=[1,3]", "num_gpus=2")) == 0
    requests, sweep, status = read_requests(out), read_sweep(out), read_status(out)
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
    assert sorted(path.name for path in out.iterdir()) == ["points", "requests.parquet", "status.json", "sweep.csv"]


def test_concurrency_as_the_server_sees_it(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [tokens(gap_s=0.01)]
    assert main(words(server, tmp_path, "concurrency=4", "num_requests=20", "warmup_requests=4")) == 0
    assert server.open_at_arrival[:4] == [1, 2, 3, 4]
    assert max(server.open_at_arrival) == 4


def test_without_out_nothing_is_written(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"url={server.url}/v1/", "concurrency=1", "endpoint=completions", "dataset=random", *OWN]) == 0
    assert list(tmp_path.iterdir()) == []
    assert set(server.paths) == {"/v1/completions"}
    assert {body["model"] for body in server.bodies} == {"demo"}, "the first that /v1/models lists"
    assert "output" in capsys.readouterr().out


def test_more_fields_and_headers_go_with_every_request(server: ScriptedServer, tmp_path: Path) -> None:
    more = [
        'extra_body={"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": false}}',
        "headers={X-Tenant: bench}",
    ]
    assert main(words(server, tmp_path, "concurrency=1", *more)) == 0
    assert [(body["top_p"], body["chat_template_kwargs"]) for body in server.bodies] == [
        (0.9, {"enable_thinking": False})
    ] * 5
    assert {headers["x-tenant"] for headers in server.headers} == {"bench"}


def test_text_is_left_out_when_asked(server: ScriptedServer, tmp_path: Path) -> None:
    assert main(words(server, tmp_path, "concurrency=1", "record_text=false")) == 0
    assert set(read_requests(tmp_path)["output_text"]) == {""}


def test_under_a_launcher_a_run_that_failed_is_the_launchers_to_say(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [reply(503, "queue is full")]
    assert main(words(server, tmp_path, "concurrency=1", "deployment=its-key")) == 1
    status = read_status(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("running", ["failed"])
    assert "failed" in status.reason, "what the launcher passes on"


def test_a_point_where_everything_fails(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviours = [*[tokens()] * 5, *[reply(503, '{"error": {"message": "queue is full"}}')] * 6, tokens()]
    assert main(words(server, tmp_path, "concurrency=[1,2,3]")) == 1
    status, sweep = read_status(tmp_path), read_sweep(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("failed", ["done", "failed", "done"])
    assert status.points[1].reason == "4 of 4 requests failed, the first with: HTTP 503: queue is full"
    assert sweep["failed"].tolist() == [0, 4, 0]
    assert math.isnan(sweep["ttft_p50_ms"][1])
    assert sweep["ttft_p50_ms"][2] > 0
    assert "queue is full" in capsys.readouterr().out


def test_some_failures_do_not_fail_a_point(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [tokens(), reply(500, "boom", "text/plain"), tokens()]
    assert main(words(server, tmp_path, "concurrency=1", "num_requests=4", "max_failed_share=0.25")) == 0
    (point,) = read_status(tmp_path).points
    assert (point.state, point.reason) == ("done", "1 of 4 requests failed, the first with: HTTP 500: boom")
    requests = read_requests(tmp_path)
    assert requests["status"].tolist() == ["ok", "error", "ok", "ok", "ok"]
    assert read_sweep(tmp_path)["failed"].tolist() == [1]


def test_progress_goes_to_the_file(server: ScriptedServer, tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    assert main(words(server, tmp_path / "out", "concurrency=[1,2]", f"progress={file}")) == 0
    state = json.loads(file.read_text())
    assert state.pop("output_tok_s") > 0
    assert state.pop("elapsed_s") > 0
    assert set(state.pop("latencies")) == {"ttft", "tpot"}
    assert state == {
        "points": 2, "point": 1, "concurrency": 2, "request_rate": 0.0, "phase": "done", "done": 6, "total": 6,
        "failed": 0, "cancelled": 0,
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
    status, requests = read_status(tmp_path), read_requests(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("cancelled", ["done", "cancelled", "pending"])
    assert requests.query("point == 0")["status"].tolist() == ["ok"] * 5
    assert sorted(requests.query("point == 1")["status"]) == ["interrupted", "interrupted", "ok"]
    assert read_sweep(tmp_path)["concurrency"].tolist() == [1], "an interrupted point has no figures"


def test_a_server_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["url=http://127.0.0.1:9", "model=demo", f"out={tmp_path}", "concurrency=[1,2]"]) == 1
    status = read_status(tmp_path)
    assert (status.state, [p.state for p in status.points]) == ("failed", ["pending", "pending"])
    assert "cannot be reached" in status.reason
    assert "cannot be reached" in caplog.text


def test_a_server_that_is_not_ready(server: ScriptedServer, tmp_path: Path) -> None:
    server.health = web.HTTPServiceUnavailable
    assert main(words(server, tmp_path)) == 1
    assert "not ready: /health answers 503" in read_status(tmp_path).reason
    assert server.bodies == []
    server.health = web.HTTPOk
    assert main(words(server, tmp_path, "concurrency=1")) == 0, "nothing was measured: the folder may be used again"
    assert read_status(tmp_path).state == "done"


def test_a_server_without_health(server: ScriptedServer, tmp_path: Path) -> None:
    server.health = web.HTTPNotFound
    assert main(words(server, tmp_path, "concurrency=1")) == 0


def test_a_model_that_is_not_served(server: ScriptedServer, tmp_path: Path) -> None:
    server.models = ["demo-a", "demo-b"]
    assert main(words(server, tmp_path)) == 1
    assert "it serves: demo-a, demo-b" in read_status(tmp_path).reason


def test_results_are_never_overwritten(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(server, tmp_path, "concurrency=1")) == 0
    before = (tmp_path / records.REQUESTS).read_bytes()
    assert main(words(server, tmp_path, "concurrency=1")) == 2
    assert "holds the results of a sweep already" in capsys.readouterr().err
    assert (tmp_path / records.REQUESTS).read_bytes() == before


def test_request_rates(server: ScriptedServer, tmp_path: Path) -> None:
    more = ["request_rate=[40,80]", "arrival=constant", "num_requests=8", "warmup_requests=2"]
    assert main(words(server, tmp_path, *more)) == 0
    requests, sweep, status = (
        read_requests(tmp_path),
        read_sweep(tmp_path),
        read_status(tmp_path),
    )
    assert sweep["request_rate"].tolist() == [40, 80] == [p.request_rate for p in status.points]
    assert sweep["requests"].tolist() == [8, 8]
    assert (sweep["concurrency"] >= 1).all(), "the mean number in flight, so that charts have an axis"
    first = requests[requests["point"] == 0]
    due = (first["t_send"] + first["scheduled_s"]).sort_values().diff().dropna()
    assert due.tolist() == pytest.approx([1 / 40] * 9, abs=1e-3), "due by an absolute schedule, whenever it was sent"
    assert (sweep["ttft_sched_p50_ms"] >= sweep["ttft_p50_ms"]).all()


def test_a_cap_shows_in_the_figures_from_the_schedule(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [tokens(gap_s=0.05)]
    more = ["request_rate=100", "arrival=constant", "num_requests=6", "warmup_requests=0", "max_concurrency=1"]
    assert main(words(server, tmp_path, *more)) == 0
    sweep = read_sweep(tmp_path)
    assert max(server.open_at_arrival) == 1
    assert sweep["e2e_sched_p99_ms"][0] > sweep["e2e_p99_ms"][0] + 300, "five answers of 0.1 s and more came before"
    (point,) = read_status(tmp_path).points
    assert point.client is not None
    assert point.client.verdict == "client_limited"


def test_a_trace_is_replayed(server: ScriptedServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"at_s": {at}, "isl": 5, "osl": {osl}}}\n' for at, osl in ((3, 2), (3.4, 4), (3.8, 3))))
    out = tmp_path / "out"
    more = ["dataset=trace", f"dataset_path={trace}", "arrival=trace", "speedup=4"]
    assert main(words(server, out, *more)) == 0
    requests = read_requests(out)
    assert sorted(body["max_tokens"] for body in server.bodies) == [2, 3, 4]
    assert sorted(requests["output_tokens"]) == sorted(requests["expected_output_tokens"]) == [2, 3, 4]
    due = (requests["t_send"] + requests["scheduled_s"]).sort_values().diff().dropna()
    assert due.tolist() == pytest.approx([0.1, 0.1], abs=1e-3)
    assert read_sweep(out)["requests"].tolist() == [3]


def test_conversations_carry_the_answers(server: ScriptedServer, tmp_path: Path) -> None:
    more = ["dataset=random", "isl=4", "turns=3", "concurrency=2", "num_requests=6", "warmup_requests=0", "seed=3"]
    assert main(words(server, tmp_path, *more)) == 0
    requests = read_requests(tmp_path)
    assert requests.groupby("session")["turn"].apply(list).tolist() == [[0, 1, 2], [0, 1, 2]]
    longest = [body["messages"] for body in server.bodies if len(body["messages"]) == 5]
    assert len(longest) == 2
    for messages in longest:
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        assert {m["content"] for m in messages[1::2]} == {"w0 w1 w2 "}
    sticky = {(h["x-session-id"], n) for h, n in zip(server.headers, server.ports, strict=True)}
    assert len(sticky) == 2, "a conversation keeps its connection"


def test_requests_given_up_as_asked_are_no_failures(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behaviours = [tokens(50, gap_s=0.02)]
    file = tmp_path / "progress.json"
    more = ["cancel_fraction=1", "cancel_after_s=0.15", "concurrency=2", "num_requests=4", "slo_ttft_ms=5000"]
    assert main(words(server, tmp_path / "out", *more, f"progress={file}")) == 0
    requests, sweep = read_requests(tmp_path / "out"), read_sweep(tmp_path / "out")
    assert set(requests["status"]) == {"cancelled"}
    assert set(requests["error"]) == {"given up after 0.15 s, as cancel_fraction asks"}
    (point,) = read_status(tmp_path / "out").points
    assert (point.state, point.reason, point.good_share) == ("done", "", None)
    assert [sweep[name].tolist() for name in ("requests", "failed", "cancelled")] == [[4], [0], [4]]
    assert "failed   cancelled" in capsys.readouterr().out
    state = json.loads(file.read_text())
    assert (state["failed"], state["cancelled"]) == (0, 6), "the warm-up's two with them"


def test_a_load_that_cancels_is_judged_by_the_other_requests(server: ScriptedServer, tmp_path: Path) -> None:
    hanging = 0

    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal hanging
        hanging += 1
        return await (hang if hanging % 2 else tokens())(request, body)

    server.behaviours = [behave]
    more = ["cancel_fraction=1", "cancel_after_s=0.3", "concurrency=1", "num_requests=4", "warmup_requests=0"]
    assert main(words(server, tmp_path, *more, "slo_e2e_ms=100000", "max_failed_share=0")) == 0
    (point,) = read_status(tmp_path).points
    assert (point.state, point.good_share) == ("done", 1.0)
    row = read_sweep(tmp_path).iloc[0]
    assert (row["requests"], row["failed"], row["cancelled"]) == (4, 0, 2)


def test_the_search_finds_the_objective(
    server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def behave(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        slow = server.open_now > 3
        return await tokens(2, gap_s=0.3 if slow else 0.001)(request, body)

    server.behaviours = [behave]
    more = ["concurrency=[1,6]", "search=true", "slo_e2e_ms=250", "slo_share=0.8", "num_requests=12"]
    more += ["max_wrong_length_share=1"]
    caplog.set_level("INFO")
    assert main(words(server, tmp_path, *more)) == 0
    status = read_status(tmp_path)
    tried = {p.concurrency: p.good_share for p in status.points}
    assert list(tried)[:2] == [1, 6]
    assert tried[1] == 1
    assert tried[6] is not None
    assert tried[6] < 0.8
    assert "the largest load that meets the objectives: concurrency" in caplog.text


def test_metrics_and_hooks(server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.metrics = 'vllm:num_requests_running{model_name="demo"} 3.0\nsglang:token_usage 0.5\n'
    more = ["concurrency=[1,2]", "flush_cache=true", "profile=true", "scrape_interval_s=0.05"]
    assert main(words(server, tmp_path, *more)) == 0
    samples = read_server_metrics(tmp_path)
    assert set(samples["name"]) == {"vllm:num_requests_running", "sglang:token_usage"}
    row = samples[samples["name"] == "vllm:num_requests_running"].iloc[0]
    assert (row["labels"], row["value"], row["url"]) == ('{"model_name": "demo"}', 3.0, f"{server.url}/metrics")
    assert row["time"] == pytest.approx(read_requests(tmp_path)["t_send"].iloc[0], abs=30)
    assert server.hooks == ["/flush_cache", "/start_profile"] * 2
    assert caplog.text.count("/stop_profile: HTTP 404; the sweep goes on without it") == 1


def test_raw_answers_are_kept_when_asked(server: ScriptedServer, tmp_path: Path) -> None:
    import pandas as pd

    assert main(words(server, tmp_path, "concurrency=1", "num_requests=2", "record_raw=true")) == 0
    raw, requests = pd.read_parquet(tmp_path / records.RAW), read_requests(tmp_path)
    assert raw["request_id"].tolist() == requests["request_id"].tolist()
    assert b"".join(raw["data"][0]).count(b'"content": "w') == 3
    seconds = (raw["read_ns"][0][0] * 1e-9) - requests["t_send"][0]
    assert seconds == pytest.approx(requests["first_byte_s"][0], abs=1e-5)


def test_strict_turns_the_verdict_into_a_status(server: ScriptedServer, tmp_path: Path) -> None:
    more = ["request_rate=100", "num_requests=6", "max_concurrency=1", "strict=true"]
    server.behaviours = [tokens(gap_s=0.05)]
    assert main(words(server, tmp_path, *more)) == 3
    assert read_status(tmp_path).state == "done"


def test_several_processes_share_a_point(server: ScriptedServer, tmp_path: Path) -> None:
    server.behaviours = [tokens(gap_s=0.05)]  # long enough to overlap, however busy the machine
    assert main(words(server, tmp_path, "concurrency=[1,5]", "workers=2", "num_requests=21")) == 0
    requests, status = read_requests(tmp_path), read_status(tmp_path)
    assert requests.groupby("point").size().tolist() == [22, 26]
    assert requests["request_id"].is_unique
    assert [p.client.workers for p in status.points if p.client] == [1, 2], "one slot is one process's"
    assert max(server.open_at_arrival) == 5


def test_a_server_that_restarts(tmp_path: Path) -> None:
    """Requests fail while it is away, each with a row; those after it are fine; nobody waits for ever."""
    first, second = ScriptedServer(), ScriptedServer()
    first.behaviours = second.behaviours = [tokens(2, gap_s=0.002)]
    with first.running():
        port = int(first.url.rpartition(":")[2])
        more = ["concurrency=2", "num_requests=60", "max_failed_share=1", "max_wrong_length_share=1", "gone_s=20"]
        argv = [sys.executable, "-m", "toolkit.loadgen", *words(first, tmp_path, *more)]
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while len(first.bodies) < 10:
            signal.sigtimedwait([], 0.01)
    signal.sigtimedwait([], 0.5)
    with second.running(port):
        assert process.wait(60) == 0
    requests = read_requests(tmp_path)
    assert len(requests) == 62
    assert requests["request_id"].is_unique
    assert {"ok", "error"} == set(requests["status"])
    assert requests["status"].iloc[-1] == "ok"
    assert requests["error"].str.contains("Cannot connect").any()
    assert len(first.bodies) + len(second.bodies) >= (requests["status"] == "ok").sum()


def test_chunks_that_hide_tokens_are_reported(
    server: ScriptedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    total = event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 9}})
    server.behaviours = [stream(delta("abc"), delta("def", finish="stop"), total, DONE)]
    assert main(words(server, tmp_path, "concurrency=1", "max_wrong_length_share=1")) == 0
    assert "in 4 of 4 requests the server counted other than one token a chunk" in caplog.text
    assert set(read_requests(tmp_path)["output_tokens"]) == {9}
