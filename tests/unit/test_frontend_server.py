"""The server around the completions: bad input, API key, health, control operations, metrics, the process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from tests.unit.frontend_peer import TINY_MIXTRAL, TOKEN, Ranks, args_for, each_way, free_port, serving, until, utf8
from tests.unit.test_frontend_generate import CHAT, TEXT, chat, text
from toolkit.config.model import ModelConfig
from toolkit.engine.args import TOKEN_ENV
from toolkit.engine.frontend.operations import PATHS
from toolkit.engine.frontend.protocol import ChatRequest
from toolkit.engine.frontend.server import Server, api_key
from toolkit.engine.messages import Control, ControlReply, Failed, Generate, Progress, Ready, Stats

__all__ = ["each_way"]
pytestmark = pytest.mark.usefixtures("each_way")

BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    # path, body, status, param, what the message must hold
    (TEXT, text(max_tokens=-1), 400, "max_tokens", "max_tokens=-1: expected `int` >= 0"),
    (TEXT, text(max_tokens=0), 400, "max_tokens", "max_tokens=0 must be at least 1, or echo=true"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "expected `int` >= 1"),
    (TEXT, text(max_tokens=127), 400, "max_tokens", "use max_tokens<=126"),
    (TEXT, text(max_tokens="9"), 400, "max_tokens", 'max_tokens="9": expected `int | null`, got `str`'),
    (TEXT, text(max_tokens=1.5), 400, "max_tokens", "max_tokens=1.5"),
    (CHAT, chat(max_tokens=None, max_completion_tokens=0), 400, "max_completion_tokens", "expected `int` >= 1"),
    (CHAT, chat(max_completion_tokens=3), 400, "max_tokens", "differs from max_completion_tokens=3"),
    (TEXT, text(prompt="x" * 128), 400, "prompt", "the prompt has 128 tokens, max_model_len=128"),
    (TEXT, text(prompt=""), 400, "prompt", "empty"),
    (TEXT, text(prompt=[]), 400, "prompt", "empty"),
    (TEXT, text(prompt=["a", "b"]), 400, "prompt", "2 prompts"),
    (TEXT, text(prompt=[1, 300]), 400, "prompt", "token id 300, the vocabulary has 300"),
    (TEXT, text(prompt=[-1, 2]), 400, "prompt", "token id -1"),
    (TEXT, text(prompt=[1, "a"]), 400, "prompt", "mixes text and token ids"),
    (TEXT, text(prompt=[True]), 400, "prompt[0]", "prompt[0]=true"),
    (TEXT, text(prompt=5), 400, "prompt", "prompt=5"),
    (TEXT, {"model": "tiny"}, 400, None, "missing required field `prompt`"),
    (TEXT, text(temperature=2.5), 400, "temperature", "temperature=2.5: expected `float` <= 2.0"),
    (TEXT, text(temperature=-0.1), 400, "temperature", "temperature=-0.1"),
    (TEXT, text(top_p=0), 400, "top_p", "top_p=0"),
    (TEXT, text(top_p=1.1), 400, "top_p", "top_p=1.1"),
    (TEXT, text(seed=-1), 400, "seed", "seed=-1"),
    (TEXT, text(seed=2**64), 400, "seed", "seed=18446744073709551616"),
    (TEXT, text(stop=["a"] * 5), 400, "stop", "expected `array` of length <= 4"),
    (TEXT, text(stop=""), 400, "stop", "expected `str` of length >= 1"),
    (TEXT, text(model="other"), 404, "model", "model=other is not served here: use tiny"),
    (CHAT, chat(echo=True), 400, "echo", "echo=true is not served here: leave it out or send false"),
    (TEXT, text(n=0), 400, "n", "n=0"),
    (TEXT, text(n=True), 400, "n", "n=true"),
    (TEXT, text(min_tokens=21), 400, "min_tokens", "min_tokens=21 is more than max_tokens=20"),
    (CHAT, chat(max_tokens=None, min_tokens=120), 400, "min_tokens", "more than the 109 tokens"),
    (TEXT, text(top_k=-2), 400, "top_k", "top_k=-2: expected `int` >= -1"),
    (TEXT, text(min_p=1.5), 400, "min_p", "min_p=1.5"),
    (TEXT, text(repetition_penalty=0), 400, "repetition_penalty", "expected `float` >= 0.01"),
    (TEXT, text(presence_penalty=-3), 400, "presence_penalty", "presence_penalty=-3"),
    (TEXT, text(logit_bias={"x": 1}), 400, "logit_bias", "matching regex"),
    (TEXT, text(logit_bias={"300": 1}), 400, "logit_bias", "token id 300, the vocabulary has 300"),
    (TEXT, text(logit_bias={"3": 101}), 400, "logit_bias", "expected `float` <= 100.0"),
    (TEXT, text(stop_token_ids=[3, 300]), 400, "stop_token_ids", "token id 300"),
    (TEXT, text(logprobs=21), 400, "logprobs", "expected `int` <= 20"),
    (CHAT, chat(logprobs=3), 400, "logprobs", "logprobs=3: expected `bool | null`"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs", "needs logprobs=true"),
    (TEXT, text(temprature=1), 400, "temprature", "did you mean temperature?"),
    (TEXT, text(stream_options={"include_usage": True}), 400, "stream_options", "needs stream=true"),
    (TEXT, text(stream=True, stream_options={"x": 1}), 400, "stream_options", "unknown field `x`"),
    (CHAT, chat(messages=[]), 400, "messages", "messages=[]: expected `array` of length >= 1"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0]", "missing required field `content`"),
    (CHAT, chat(messages=[{"role": "king", "content": ""}]), 400, "messages[0].role", 'role="king"'),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, None, "content"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "is not served here"),
    (CHAT, text(), 400, "prompt", "prompt is not a field"),
]


def test_bad_requests_are_refused_with_field_value_and_rule_and_lose_nothing() -> None:
    async def run() -> None:
        async with serving() as bench:
            open_request = asyncio.create_task(bench.post(TEXT, text()))
            rid = (await bench.ranks.generate()).rid
            for path, body, status, param, words in BAD:
                got, answer, headers = await bench.post(path, body)
                assert got == status, (body, answer)
                error = answer["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
                assert words in error["message"], (body, error)
                assert param in (None, error["param"]), (body, error)
                assert headers["x-request-id"]
            await bench.ranks.output(rid, utf8("still here"), "length")
            assert (await open_request)[1]["choices"][0]["text"] == "still here"
            await bench.ranks.check_wakes()
            assert sum(len(seen) for seen in bench.ranks.seen) == 2  # one Generate, one Wake: nothing bad got through

    asyncio.run(run())


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": "tiny", }', b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt":"\\ud800"}']
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    async def run() -> None:
        async with serving() as bench, bench.http.post(TEXT, data=body) as response:
            error = (await response.json())["error"]
            assert response.status == 400 and error["code"] == "invalid_json", error

    asyncio.run(run())


def test_wrong_routes_methods_and_sizes_answer_in_the_error_format() -> None:
    async def run() -> None:
        async with serving() as bench:
            for call, status, words in [
                (bench.http.get(CHAT), 405, "GET is not allowed on /v1/chat/completions"),
                (bench.http.post("/v1/embeddings"), 404, "/v1/embeddings"),
                (bench.http.post(TEXT, data=b" " * (33 * 2**20)), 413, "larger than"),
            ]:
                async with call as response:
                    assert response.status == status
                    assert words in (await response.json())["error"]["message"]
                    assert response.headers.get("Allow") == ("POST" if status == 405 else None)

    asyncio.run(run())


def test_the_kv_cache_of_one_dp_rank_limits_a_request() -> None:
    async def run() -> None:
        async with serving(ready=False) as bench:
            await bench.ranks.all_ready(max_model_len=128, max_total_tokens=64)
            await until(lambda: bench.server.state == "ready")
            _, body, _ = await bench.post(TEXT, text(max_tokens=63))
            assert "engine.max_total_tokens=64" in body["error"]["message"]
            status, body = await bench.get("/v1/models")
            assert status == 200 and body["data"][0]["id"] == "tiny" and body["data"][0]["max_model_len"] == 64

    asyncio.run(run())


def test_api_key_guards_everything_but_health_and_metrics() -> None:
    async def run() -> None:
        async with serving(api_key="sesame") as bench:
            bench.ranks.reply = [utf8("a")]
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
                status, body, _ = await bench.post(TEXT, text(), headers=header)
                assert status == 401 and body["error"]["code"] == "invalid_api_key"
                assert (await bench.post("/flush_cache", None, headers=header))[0] == 401
            assert (await bench.get("/get_server_info"))[0] == (await bench.get("/v1/models"))[0] == 401
            assert (await bench.get("/health"))[0] == (await bench.get("/live"))[0] == 200
            assert (await bench.post(TEXT, text(), headers={"Authorization": "Bearer sesame"}))[0] == 200
            assert len(bench.ranks.of(0, Generate) + bench.ranks.of(1, Generate)) == 1

    asyncio.run(run())


def test_a_named_key_that_is_not_set_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    args = msgspec.structs.replace(_plain_args(), api_key_env="SERVER_KEY")
    with pytest.raises(ValueError, match="SERVER_KEY is not set"):
        api_key(args)
    monkeypatch.setenv("SERVER_KEY", "sesame")
    assert api_key(args) == "sesame"


def _plain_args() -> Any:
    async def run() -> Any:
        ranks = Ranks(1, 1)
        try:
            return args_for(ranks, 1, 1)
        finally:
            await ranks.close()

    return asyncio.run(run())


def test_health_follows_the_ranks_from_loading_to_ready_to_failed() -> None:
    async def run() -> None:
        async with serving(ready=False) as bench:
            assert (await bench.get("/live"))[0] == 200
            status, body = await bench.get("/health")
            assert (status, body["state"]) == (503, "loading")
            assert body["ranks"][1] == {"rank": 1, "stage": "start", "done": 0, "total": 0}
            await bench.ranks.send(Progress(1, "load", 3, 8))
            await until(lambda: bench.server._fleet.ranks[1].done == 3)
            assert (await bench.get("/health"))[1]["ranks"][1] == {"rank": 1, "stage": "load", "done": 3, "total": 8}
            await bench.ranks.send(Ready(0, {"max_model_len": 128, "max_total_tokens": 1000}))
            await until(lambda: bench.server._fleet.ranks[0].ready)
            assert (await bench.get("/health"))[0] == 503  # rank 1 is not ready
            status, body, _ = await bench.post(TEXT, text())
            assert status == 503 and "still loading" in body["error"]["message"]
            await bench.ranks.all_ready()
            await until(lambda: bench.server.state == "ready")
            assert await bench.get("/health") == (200, {"state": "ready"})
            await bench.ranks.send(Failed(0, "lost"))
            await until(lambda: bench.server.state == "failed")
            assert await bench.get("/health") == (503, {"state": "failed", "error": "rank 0: lost"})

    asyncio.run(run())


def test_messages_without_the_token_of_the_run_are_dropped() -> None:
    async def run() -> None:
        async with serving() as bench:
            await bench.ranks.send(Failed(0, "forged"), token="guess")
            await bench.ranks._out.send_multipart([TOKEN.encode(), b"not msgpack"])
            bench.ranks.reply = [utf8("a")]
            assert (await bench.post(TEXT, text()))[0] == 200  # sent after them, so they have been read
            assert bench.server.state == "ready"

    asyncio.run(run())


def test_a_tokenizer_that_cannot_be_loaded_fails_the_server(tmp_path: Path) -> None:
    async def run() -> None:
        model = ModelConfig(name="tiny", hf_config=TINY_MIXTRAL, tokenizer=str(tmp_path / "missing"))
        async with serving(ready=False, model=model) as bench:
            await until(lambda: bench.server.state == "failed", limit_s=60)
            _, body = await bench.get("/health")
            assert "missing is not a folder" in body["error"]

    asyncio.run(run())


def test_control_operations_reach_every_rank_and_wait_for_all() -> None:
    async def run() -> None:
        async with serving() as bench:
            call = asyncio.create_task(bench.post("/dump_expert_distribution_record", {"since": 12.5}))
            await until(lambda: all(bench.ranks.of(rank, Control) for rank in range(2)))
            sent = [bench.ranks.seen[rank] for rank in range(2)]
            assert sent[0] == sent[1] and len(sent[0]) == 1 and sent[0][0].op == "dump_experts"  # and no Wake
            cid = sent[0][0].cid
            assert sent[0][0].since == 12.5
            await bench.ranks.send(ControlReply(cid, 1, True))
            assert not call.done()
            await bench.ranks.send(ControlReply(cid, 0, True, "experts.npz"))
            status, body, _ = await call
            assert (status, body["ok"]) == (200, True)
            assert body["ranks"] == [{"rank": 0, "detail": "experts.npz"}, {"rank": 1, "detail": ""}]

            call = asyncio.create_task(bench.post("/flush_cache", None))
            await until(lambda: len(bench.ranks.of(1, Control)) == 2)
            cid = bench.ranks.of(1, Control)[1].cid
            for rank, ok in ((0, True), (1, False)):
                await bench.ranks.send(ControlReply(cid, rank, ok, "" if ok else "requests are running"))
            status, body, _ = await call
            assert status == 500 and "flush_cache failed on rank 1: requests are running" in body["error"]["message"]

    asyncio.run(run())


def test_options_of_control_operations_are_checked_and_sent() -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            for path, body, words in [
                ("/slow_down", {"forward_sleep_time": -1}, "forward_sleep_time=-1: expected `float` >= 0.0"),
                ("/slow_down", {"seconds": 1}, "unknown field `seconds`"),
                ("/flush_cache", [], "must be a JSON object"),
                ("/flush_cache", {"now": True}, "unknown field `now`"),
                ("/start_profile", {"name": "../up"}, "name="),
                ("/start_profile", {"num_steps": 0}, "num_steps=0"),
            ]:
                status, answer, _ = await bench.post(path, body)
                assert status == 400 and words in answer["error"]["message"], answer
            expected = [
                ("/slow_down", {"forward_sleep_time": 1.5}, {"op": "slow_down", "sleep_s": 1.5}),
                ("/slow_down", {"forward_sleep_time": None}, {"op": "slow_down", "sleep_s": 0.0}),
                ("/start_profile", {"name": "a-1", "num_steps": 3}, {"folder": "a-1", "num_steps": 3}),
                ("/stop_profile", {}, {"op": "stop_profile"}),
                ("/start_expert_distribution_record", None, {"op": "start_experts"}),
                ("/stop_expert_distribution_record", None, {"op": "stop_experts"}),
            ]
            for i, (path, body, fields) in enumerate(expected):
                call = asyncio.create_task(bench.post(path, body))
                await until(lambda i=i: len(bench.ranks.of(0, Control)) > i)  # type: ignore[misc]
                sent = bench.ranks.of(0, Control)[i]
                assert {name: getattr(sent, name) for name in fields} == fields
                await bench.ranks.send(ControlReply(sent.cid, 0, False, "not now", refused=True))
                status, answer, _ = await call
                assert status == 409 and answer["error"]["code"] == "refused", answer
                assert answer["error"]["message"] == f"{sent.op} failed on rank 0: not now"

    asyncio.run(run())


def test_the_openapi_document_has_every_route_and_the_types_that_parse(each_way: int) -> None:
    async def run() -> None:
        async with serving(tp_size=1, dp_size=1) as bench:
            _, document = await bench.get("/openapi.json")
            served = {
                (route.resource.canonical, route.method.lower())
                for route in bench.server._http._runner.app.router.routes()
                if route.resource is not None and route.method != "HEAD"
            }
            if each_way > 1:
                assert served == {(path, method.lower()) for method, path in PATHS}, "what API servers pass on"
                served |= {(TEXT, "post"), (CHAT, "post")}
            assert served == {(path, method) for path, methods in document["paths"].items() for method in methods}
            schemas = document["components"]["schemas"]
            assert schemas["ChatRequest"]["properties"]["model"] == {"enum": ["tiny", None]}
            assert schemas["CompletionRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 128
            assert schemas["CompletionRequest"]["properties"]["tools"] == {"enum": [[], None]}
            assert "echo" not in ChatRequest.__struct_fields__ and schemas["ChatRequest"]["required"] == ["messages"]
            names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
            assert names <= schemas.keys()

    asyncio.run(run())


def test_a_control_operation_names_the_ranks_that_stay_silent() -> None:
    async def run() -> None:
        async with serving(control_timeout_s=0.3) as bench:
            call = asyncio.create_task(bench.post("/flush_cache", None))
            await until(lambda: bool(bench.ranks.of(0, Control)))
            await bench.ranks.send(ControlReply(bench.ranks.of(0, Control)[0].cid, 0, True))
            status, body, _ = await call
            assert status == 504 and "no reply from rank 1 within 0.3 s" in body["error"]["message"]

    asyncio.run(run())


def test_metrics_show_the_ranks_and_the_requests() -> None:
    async def run() -> None:
        async with serving() as bench:
            bench.ranks.reply = [utf8("a"), utf8("bc")]
            await bench.post(TEXT, text())
            await bench.post(TEXT, text(max_tokens=-1))
            for dp_rank in range(2):
                await bench.ranks.send(
                    Stats(dp_rank, 3 + dp_rank, 2, 250, 1000, 40, 1.5, 90, 30, 70, 1, float("nan") if dp_rank else 0.8)
                )
            await until(lambda: len(bench.server._fleet.stats) == 2)
            async with bench.http.get("/metrics") as response:
                lines = (await response.text()).splitlines()
            for line in [
                'wideep:num_running_reqs{dp_rank="1"} 4.0',
                'wideep:token_usage{dp_rank="0"} 0.25',
                'wideep:generation_tokens_total{dp_rank="0"} 70.0',
                'wideep:engine_step_seconds_total{dp_rank="0"} 1.5',
                "wideep:expert_balancedness 0.8",
                "wideep:time_to_first_token_seconds_count 1.0",
                "wideep:inter_token_latency_seconds_count 2.0",
                "wideep:e2e_request_latency_seconds_count 1.0",
                'wideep:http_requests_total{code="200",route="/v1/completions"} 1.0',
                'wideep:http_requests_total{code="400",route="/v1/completions"} 1.0',
            ]:
                assert line in lines, "\n".join(lines)

    asyncio.run(run())


def test_server_info_tells_the_configuration() -> None:
    async def run() -> None:
        async with serving() as bench:
            status, body = await bench.get("/get_server_info")
            assert status == 200 and body["parallel"]["tp_size"] == 2 and body["state"] == "ready"
            assert body["ranks"][1]["info"]["max_total_tokens"] == 1000
            assert TOKEN not in json.dumps(body)

    asyncio.run(run())


def test_a_port_in_use_is_named(each_way: int) -> None:
    async def run() -> None:
        ranks = Ranks(1, 1)
        try:
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                port = taken.getsockname()[1]
                args = args_for(ranks, 1, 1)
                with pytest.raises(ValueError, match=f"http=127.0.0.1:{port} cannot be bound.*cluster.port"):
                    args = msgspec.structs.replace(args, http=("127.0.0.1", port), api_servers=each_way)
                    await Server(args, TOKEN).start()
                with pytest.raises(ValueError, match=f"inbox=127.0.0.1:{port} cannot be bound.*cluster.port"):
                    worker = msgspec.structs.replace(args.workers[0], inbox=("127.0.0.1", port))
                    Server(msgspec.structs.replace(args, workers=[worker]), TOKEN)
        finally:
            await ranks.close()

    asyncio.run(run())


def test_unknown_router_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="router=kv is not known, use one of: round_robin"):
        Server(msgspec.structs.replace(_plain_args(), router="kv"), TOKEN)


def test_the_process_serves_and_ends_on_sigterm_and_never_imports_torch(tmp_path: Path, each_way: int) -> None:
    args = msgspec.structs.replace(_plain_args(), http=("127.0.0.1", free_port()), api_servers=each_way)
    file = tmp_path / "frontend.json"
    file.write_bytes(msgspec.json.encode(args))
    code = (
        "import sys; from toolkit.engine.frontend.__main__ import main; rc = main();"
        "loaded = {name for name, module in sys.modules.items() if module is not None};"
        "assert not {'torch', 'transformers', 'pandas'} & loaded; sys.exit(rc)"
    )
    command = [sys.executable, "-c", code, "--args", str(file)]
    env = {**os.environ, TOKEN_ENV: TOKEN}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _wait_live(f"http://127.0.0.1:{args.http[1]}/live", process)
            others = psutil.Process(process.pid).children()
            assert len(others) == (each_way if each_way > 1 else 0)
            assert not any("libtorch" in found.path for other in others for found in other.memory_maps())
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=30)
            assert not any(other.is_running() for other in others)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert TOKEN not in output
    without = {key: value for key, value in os.environ.items() if key != TOKEN_ENV}
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.engine.frontend", "--args", str(file)], env=without, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(f"frontend: {TOKEN_ENV} is not set")


def _wait_live(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            with urllib.request.urlopen(url) as response:
                assert response.status == 200
                return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise AssertionError("the server did not answer")
