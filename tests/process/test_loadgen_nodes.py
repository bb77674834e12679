"""A load generator on several nodes: groups that join over TCP, here all on one host."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from tests.unit.loadgen_server import ScriptedServer, hang, tokens
from toolkit import records
from toolkit.launch.ports import free_range
from toolkit.loadgen.__main__ import main
from toolkit.loadgen.groups import groups
from toolkit.loadgen.links import TOKEN_ENV, Begin, Hello, Link, LinkError, Ping, Pong, Refused, Tell
from toolkit.loadgen.pool import Member, WorkerError
from toolkit.loadgen.rows import moved
from toolkit.loadgen.wire import Point, Setup
from toolkit.records.requests import read_requests
from toolkit.records.status import read_status


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    monkeypatch.setenv(TOKEN_ENV, "secret of this run")
    with ScriptedServer().running() as running:
        running.behaviours = [tokens(gap_s=0.002)]
        yield running


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_range(1)}"


def join(address: str, token: str = "secret of this run") -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "toolkit.loadgen", "join", address]
    return subprocess.Popen(argv, env=os.environ | {TOKEN_ENV: token}, stderr=subprocess.PIPE, text=True)


def words(server: ScriptedServer, out: Path, address: str, *more: str) -> list[str]:
    nodes = [] if any(word.startswith("nodes=") for word in more) else ["nodes=2"]
    busy = "max_client_verdict=client_limited"  # this machine may be
    return [f"url={server.url}", "model=demo", f"out={out}", "osl=3", busy, f"listen={address}", *nodes, *more]


def test_two_nodes_share_every_point(server: ScriptedServer, tmp_path: Path, address: str) -> None:
    server.behaviours = [tokens(gap_s=0.05)]  # long enough to overlap, however busy the machine
    other = join(address)
    more = ["concurrency=[1,6]", "num_requests=24", "workers=1", "record_raw=true"]
    assert main(words(server, tmp_path, address, *more)) == 0
    assert other.wait(30) == 0
    requests, status = read_requests(tmp_path), read_status(tmp_path)
    assert requests.groupby("point").size().tolist() == [25, 30]
    assert requests["request_id"].is_unique
    assert set(requests["status"]) == {"ok"}
    assert [p.client.workers for p in status.points if p.client] == [1, 2], "one slot is one node's"
    assert max(server.open_at_arrival) == 6
    proof = status.points[1].client
    assert proof is not None and 0 < proof.clock_offset_ms < 1000, "one host has one clock, if a busy one"
    raw = pd.read_parquet(tmp_path / records.RAW)
    assert raw["request_id"].tolist() == requests["request_id"].tolist(), "raw bytes come from both nodes"


def test_one_command_on_every_node_of_a_job_step(server: ScriptedServer, tmp_path: Path, address: str) -> None:
    argv = [sys.executable, "-m", "toolkit.loadgen", *words(server, tmp_path, address, "concurrency=4", "nodes=3")]
    tasks = [subprocess.Popen(argv, env=os.environ | {"SLURM_PROCID": str(rank)}) for rank in (2, 1, 0)]
    assert [task.wait(60) for task in tasks] == [0, 0, 0]
    assert read_status(tmp_path).state == "done"
    assert len(read_requests(tmp_path)) == 4 + 8


def test_interruption_keeps_what_the_other_node_measured(server: ScriptedServer, tmp_path: Path, address: str) -> None:
    server.behaviours = [hang]
    other = join(address)
    argv = [sys.executable, "-m", "toolkit.loadgen", *words(server, tmp_path, address, "concurrency=4", "workers=1")]
    leader = subprocess.Popen(argv)
    while len(server.bodies) < 4:
        time.sleep(0.02)
    leader.send_signal(signal.SIGINT)
    assert leader.wait(60) == 130
    assert other.wait(30) == 0
    assert read_requests(tmp_path)["status"].tolist() == ["interrupted"] * 4


def test_a_node_that_dies_fails_the_run_by_name(
    server: ScriptedServer, tmp_path: Path, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.behaviours = [hang]
    argv = [sys.executable, "-m", "toolkit.loadgen", *words(server, tmp_path, address, "concurrency=4", "workers=1")]
    other, leader = join(address), subprocess.Popen(argv)
    while len(server.bodies) < 4:
        time.sleep(0.02)
    other.kill()
    assert leader.wait(60) == 1
    assert "group on" in read_status(tmp_path).reason


def test_a_stranger_is_refused(server: ScriptedServer, tmp_path: Path, address: str) -> None:
    stranger, other = join(address, "another secret"), None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.loadgen", *words(server, tmp_path, address, "concurrency=1")]
        )
        assert stranger.wait(30) == 1
        assert stranger.stderr is not None and "the secret is not this run's" in stranger.stderr.read()
        other = join(address)
        assert process.wait(60) == 0
    finally:
        stranger.kill()
        if other is not None:
            assert other.wait(30) == 0


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    assert main(["nodes=2", "concurrency=1"]) == 2
    assert "nodes=2 needs an address where the other nodes join; give listen=HOST:PORT" in capsys.readouterr().err
    assert main(["join", "node1"]) == 2
    assert "join=node1 is not an address" in capsys.readouterr().err
    assert main(["join", "node1:7007"]) == 2
    assert f"{TOKEN_ENV} is not set" in capsys.readouterr().err


def test_rows_stand_on_the_leaders_clock(address: str, tmp_path: Path) -> None:
    """A group whose clock is five seconds ahead."""
    setup = Setup("http://127.0.0.1:1/v1", "socket", 1.0)
    host, port = "127.0.0.1", int(address.rpartition(":")[2])
    told: list[Tell] = []

    async def ahead() -> None:
        while True:
            try:
                link = Link(*await asyncio.open_connection(host, port))
                break
            except OSError:
                await asyncio.sleep(0.01)
        await link.send(Hello("t", "ahead", 4))
        begin = await link.receive()
        assert isinstance(begin, Begin) and begin.workers == 2, "as its cores and the load suggest"
        try:
            while True:
                frame = await link.receive()
                if isinstance(frame, Ping):
                    await link.send(Pong(time.time_ns() + 5 * 10**9))
                elif isinstance(frame, Tell):
                    told.append(frame)
        except LinkError:
            return

    files = {name: str(tmp_path / name) for name in ("calls", "bodies", "rows")}
    for name in ("calls", "bodies"):
        (tmp_path / name).write_bytes(b"")

    async def lead() -> float:
        peer = asyncio.create_task(ahead())
        async with groups((host, port), "t", 1, setup, 0, 32, pin=False) as (group,):
            members: list[Member] = list(group.workers)
            for member in members:
                await member.begin(Point(0, 1, 1, False, **files))
            offset = members[1].clock_offset_s
        await peer
        return offset

    offset = asyncio.run(lead())
    assert offset == pytest.approx(5, abs=0.5)
    assert [tell.worker for tell in told] == [0, 1]
    table = pa.table({"t_send": [105.5, 106.0], "read_ns": [[5 * 10**9, 6 * 10**9], []]})
    assert moved(table, "t_send", 5.0)["t_send"].to_pylist() == [100.5, 101.0]
    assert moved(table, "read_ns", 5e9)["read_ns"].to_pylist() == [[0, 10**9], []]


def test_no_more_groups_than_asked_for_and_no_endless_wait(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.loadgen.groups.WAIT_S", 0.2)
    setup = Setup("http://127.0.0.1:1/v1", "socket", 1.0)
    host, port = "127.0.0.1", int(address.rpartition(":")[2])

    async def alone() -> None:
        async with groups((host, port), "t", 2, setup, 1, 1, pin=False):
            raise AssertionError("nobody joined")

    with pytest.raises(WorkerError, match=r"0 of 2 groups joined within .* start python -m toolkit.loadgen join"):
        asyncio.run(alone())

    async def crowded() -> object:
        async def third() -> object:
            links = []
            for name in ("b", "c"):
                link = Link(*await asyncio.open_connection(host, port))
                await link.send(Hello("t", name, 1))
                links.append(link)
            return [await link.receive() for link in links]

        monkeypatch.setattr("toolkit.loadgen.groups.WAIT_S", 10.0)
        async with asyncio.TaskGroup() as tasks:
            coming = tasks.create_task(asyncio.wait_for(_retry(third), 5))
            async with groups((host, port), "t", 1, setup, 1, 1, pin=False):
                return await coming

    answers = asyncio.run(crowded())
    assert isinstance(answers, list) and isinstance(answers[0], Begin) and isinstance(answers[1], Refused)


async def _retry(connect: object) -> object:
    assert callable(connect)
    while True:
        try:
            return await connect()
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
