"""API servers beside one frontend: what only shows with several. What all frontends do: ``test_frontend_*.py``."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.frontend_peer import TOKEN, free_port, serving, until, utf8
from tests.unit.test_frontend_generate import TEXT, text
from tests.unit.test_frontend_server import _plain_args, _wait_live
from toolkit.engine.args import TOKEN_ENV
from toolkit.engine.frontend.metrics import Metrics, Sample


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.frontend_peer.API_SERVERS", 3)


async def ask(url: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
    """On a connection of its own, which the kernel gives to one of the servers."""
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
        await answer.read()
        return answer


def test_requests_of_all_servers_go_round_over_the_ranks_and_are_counted_once() -> None:
    async def run() -> None:
        async with serving() as bench:
            bench.ranks.reply = [utf8("a"), utf8("b")]
            url = f"http://127.0.0.1:{bench.server._args.http[1]}"
            answers = [await ask(url + TEXT, text()) for _ in range(24)]
            assert Counter(a.headers["x-dp-rank"] for a in answers) == {"0": 12, "1": 12}, "one router"
            assert len({a.headers["x-request-id"] for a in answers}) == 24
            assert [a.status for a in [await ask(url + TEXT, text(n=0)) for _ in range(3)]] == [400] * 3
            await bench.ranks.check_wakes()
            async with bench.http.get("/metrics") as r:
                page = await r.text()
            families = {family.name: family for family in text_string_to_metric_families(page)}
            count = {s.name: s.value for s in families["wideep:time_to_first_token_seconds"].samples if not s.labels}
            assert count["wideep:time_to_first_token_seconds_count"] == 24
            answered = {tuple(s.labels.values()): s.value for s in families["wideep:http_requests"].samples}
            assert {v for k, v in answered.items() if set(k) == {TEXT, "200"}} == {24}
            assert {v for k, v in answered.items() if set(k) == {TEXT, "400"}} == {3}
            assert families["wideep:num_open_reqs"].samples[0].value == 0
            servers = bench.server._api_servers._all  # type: ignore[union-attr]
            figures = [await server.samples() for server in servers]
            shares = [sum(s.value for s in mine if s.name.endswith("requests_total")) for mine in figures]
            assert sum(shares) == 27 and sum(map(bool, shares)) > 1, f"the kernel deals connections out: {shares}"

    asyncio.run(run())


def test_all_that_is_open_counts_against_the_limit() -> None:
    async def run() -> None:
        async with serving(max_queued_requests=4) as bench:
            url = f"http://127.0.0.1:{bench.server._args.http[1]}"
            held = [asyncio.create_task(ask(url + TEXT, text())) for _ in range(4)]
            await until(lambda: bench.server._fleet.num_open == 4)
            for stream in (False, True):
                refused = await ask(url + TEXT, text(stream=stream))
                assert refused.status == 503 and refused.headers["Retry-After"] == "1"
                assert b"4 requests are open, engine.max_queued_requests=4" in refused._body  # type: ignore[operator]
            for rank in (0, 1):
                for index in (0, 1):
                    request = await bench.ranks.generate(rank, index)
                    await bench.ranks.output(request.rid, utf8("a"), "length")
            assert [a.status for a in await asyncio.gather(*held)] == [200] * 4

    asyncio.run(run())


def test_a_server_that_ends_leaves_no_request_on_the_ranks() -> None:
    async def run() -> None:
        async with serving(dp_size=1) as bench:
            url = f"http://127.0.0.1:{bench.server._args.http[1]}"
            held = asyncio.create_task(ask(url + TEXT, text()))
            request = await bench.ranks.generate()
            for server in bench.server._api_servers._all:  # type: ignore[union-attr]
                server._process.kill()
            assert "API server" in await asyncio.wait_for(bench.server.broken, 5)
            await until(lambda: bench.server._fleet.num_open == 0)
            held.cancel()
            assert (await bench.ranks.aborted()).rid == request.rid

    asyncio.run(run())


@pytest.fixture
def frontend(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A frontend process with two API servers that listen."""
    args = msgspec.structs.replace(_plain_args(), http=("127.0.0.1", free_port()), api_servers=2)
    file = tmp_path / "frontend.json"
    file.write_bytes(msgspec.json.encode(args))
    command = [sys.executable, "-m", "toolkit.engine.frontend", "--args", str(file)]
    env = {**os.environ, TOKEN_ENV: TOKEN}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _wait_live(f"http://127.0.0.1:{args.http[1]}/live", process)
            yield process
        finally:
            process.kill()


def test_the_frontend_ends_when_an_api_server_does(frontend: subprocess.Popen[str]) -> None:
    first, second = psutil.Process(frontend.pid).children()
    second.kill()
    output, _ = frontend.communicate(timeout=30)
    assert frontend.returncode == 1 and "API server 1 has ended" in output
    assert not first.is_running()


def test_api_servers_end_with_a_frontend_that_is_killed(frontend: subprocess.Popen[str]) -> None:
    others = psutil.Process(frontend.pid).children()
    assert len(others) == 2
    frontend.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(others, timeout=30)[1] == []


def test_figures_of_processes_are_added_and_the_earliest_beginning_kept() -> None:
    mine, theirs = Metrics(), Metrics()
    mine.http.labels("/a", "200").inc(2)
    theirs.http.labels("/a", "200").inc(3)
    theirs.http.labels("/b", "200").inc(5)
    theirs.ttft.observe(0.2)
    created = [s.value for s in mine.samples() if s.name.endswith("ttft_created") or s.name.endswith("seconds_created")]
    early = Sample("wideep:time_to_first_token_seconds", "wideep:time_to_first_token_seconds_created", {}, 5.0)
    page = mine.render([*theirs.samples(), early]).decode()
    assert 'wideep:http_requests_total{code="200",route="/a"} 5.0' in page
    assert 'wideep:http_requests_total{code="200",route="/b"} 5.0' in page
    assert 'wideep:time_to_first_token_seconds_bucket{le="0.1"} 0.0' in page
    assert 'wideep:time_to_first_token_seconds_bucket{le="0.25"} 1.0' in page
    assert "wideep:time_to_first_token_seconds_created 5.0" in page and all(value > 5 for value in created)
