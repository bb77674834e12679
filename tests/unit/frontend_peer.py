"""For the frontend's tests: a real server on a real port, and ranks that speak the real wire and follow a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.args import FrontendArgs, WorkerAddress
from toolkit.engine.frontend import api_server
from toolkit.engine.frontend.server import Server
from toolkit.engine.messages import (
    Abort,
    Generate,
    Output,
    Outputs,
    Ready,
    ToFrontend,
    ToRank,
    Wake,
    decode_to_rank,
    encode,
)
from toolkit.launch import ports

TOKEN = "token of this test"
VOCAB = 300
CONTEXT = 128

TINY_MIXTRAL = {
    "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": CONTEXT, "num_local_experts": 4, "num_experts_per_tok": 2,
    "intermediate_size": 16,
}  # fmt: skip


_claims: deque[ports.Claim] = deque()


def free_port() -> int:
    """Below the ports the kernel gives to clients: one of those, not yet bound, can be taken, or connect to itself.

    No other process of tests takes it before this one has asked for many more.
    """
    _claims.append(ports.claim(1))
    if len(_claims) > 32:
        _claims.popleft().close()
    return _claims[-1].first


def utf8(text: str) -> list[int]:
    return list(text.encode())


class Ranks:
    """All ranks of one worker. ``seen[rank]`` is what a rank has received, in order.

    Attributes:
        reply: steps of tokens that answer every Generate, the last with finish "length"; None: the test answers.
    """

    def __init__(self, tp_size: int, dp_size: int) -> None:
        self.attn_tp = tp_size // dp_size
        self.inbox_port = free_port()
        self.seen: list[list[ToRank]] = [[] for _ in range(tp_size)]
        self.reply: list[list[int]] | None = None
        self._context = zmq.asyncio.Context()
        self._sockets = [self._context.socket(zmq.PULL) for _ in range(tp_size)]
        self.ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in self._sockets]
        self._out = self._context.socket(zmq.PUSH)
        self._out.connect(f"tcp://127.0.0.1:{self.inbox_port}")
        self._tasks = [asyncio.create_task(self._run(rank)) for rank in range(tp_size)]

    def address(self, tp_size: int, dp_size: int) -> WorkerAddress:
        parallel = ParallelConfig(tp_size=tp_size, dp_size=dp_size, ep_size=tp_size, enable_dp_attention=dp_size > 1)
        inboxes = [("127.0.0.1", port) for port in self.ports]
        return WorkerAddress("rank", "agg", parallel, ("127.0.0.1", self.inbox_port), inboxes)

    async def _run(self, rank: int) -> None:
        while True:
            message = decode_to_rank(await self._sockets[rank].recv_multipart(), TOKEN)
            self.seen[rank].append(message)
            if isinstance(message, Generate) and self.reply is not None:
                for i, tokens in enumerate(self.reply):
                    await self.output(message.rid, tokens, "length" if i == len(self.reply) - 1 else None)

    async def send(self, message: ToFrontend, token: str = TOKEN) -> None:
        await self._out.send_multipart(encode(message, token))

    async def output(self, rid: str, tokens: list[int], finish: Any = None, **more: Any) -> None:
        await self.send(Outputs(0, [Output(rid, tokens, finish, **more)]))

    async def all_ready(self, max_model_len: int = CONTEXT, max_total_tokens: int = 1000) -> None:
        for rank in range(len(self.seen)):
            await self.send(Ready(rank, {"max_model_len": max_model_len, "max_total_tokens": max_total_tokens}))

    def of(self, rank: int, kind: type) -> list[Any]:
        return [message for message in self.seen[rank] if isinstance(message, kind)]

    async def generate(self, rank: int = 0, index: int = 0) -> Generate:
        """The ``index``-th request that reaches ``rank``."""
        await until(lambda: len(self.of(rank, Generate)) > index)
        found = self.of(rank, Generate)[index]
        assert isinstance(found, Generate)
        return found

    async def aborted(self, rank: int = 0) -> Abort:
        await until(lambda: bool(self.of(rank, Abort)))
        found = self.of(rank, Abort)[0]
        assert isinstance(found, Abort)
        return found

    async def check_wakes(self) -> None:
        """The wake rule: whatever was sent, one rank got it, a leader, and every other rank a Wake."""
        await until(lambda: len({len(seen) for seen in self.seen}) == 1)
        for rank, seen in enumerate(self.seen):
            assert rank % self.attn_tp == 0 or all(isinstance(message, Wake) for message in seen)
        for row in zip(*self.seen):
            assert sum(isinstance(message, Wake) for message in row) == len(self.seen) - 1

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)


API_SERVERS = 1  # of servers that tests make


@pytest.fixture(params=[1, 2], ids=["alone", "api-servers"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tests that use it run with a frontend that does all, and with one that has API servers."""
    monkeypatch.setattr("tests.unit.frontend_peer.API_SERVERS", request.param)
    num: int = request.param
    return num


class InThisLoop:
    """An API server beside the rest, as a task in place of a process."""

    def __init__(self, end: socket.socket) -> None:
        self._task = asyncio.create_task(api_server.serve(end))

    @classmethod
    async def start(cls, end: socket.socket) -> InThisLoop:
        return cls(end.dup())

    async def wait(self) -> int:
        await asyncio.wait([self._task])
        return 0

    def kill(self) -> None:
        self._task.cancel()


@dataclass
class Bench:
    """A server, its ranks and an HTTP client."""

    server: Server
    ranks: Ranks
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **more: Any) -> tuple[int, Any, Any]:
        """(status, JSON, headers)."""
        async with self.http.post(path, json=body, **more) as r:
            return r.status, json.loads(await r.read()), r.headers

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(path) as r:
            return r.status, json.loads(await r.read())

    async def stream(self, path: str, body: dict[str, Any]) -> tuple[list[Any], Any]:
        """(events, headers); the last event of a complete stream is the string [DONE]."""
        async with self.http.post(path, json={**body, "stream": True}) as r:
            assert r.status == 200, await r.text()
            lines = [line for line in (await r.read()).split(b"\n\n") if line]
        assert all(line.startswith(b"data: ") for line in lines), lines
        data = [line.removeprefix(b"data: ") for line in lines]
        return ["[DONE]" if d == b"[DONE]" else json.loads(d) for d in data], r.headers


def args_for(ranks: Ranks, tp_size: int, dp_size: int, model: ModelConfig | None = None, **engine: Any) -> FrontendArgs:
    return FrontendArgs(
        model=model or ModelConfig(name="tiny", hf_config=TINY_MIXTRAL, tokenizer="bytes", load_format="dummy"),
        engine=EngineConfig(**engine),
        http=("127.0.0.1", free_port()),
        workers=[ranks.address(tp_size, dp_size)],
    )


@contextlib.asynccontextmanager
async def serving(
    tp_size: int = 2,
    dp_size: int = 2,
    ready: bool = True,
    api_key: str = "",
    model: ModelConfig | None = None,
    control_timeout_s: float = 30.0,
    **engine: Any,
) -> AsyncIterator[Bench]:
    ranks = Ranks(tp_size, dp_size)
    args = msgspec.structs.replace(args_for(ranks, tp_size, dp_size, model, **engine), api_servers=API_SERVERS)
    server = Server(args, TOKEN, api_key, control_timeout_s, InThisLoop.start)
    try:
        await server.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{args.http[1]}") as http:
            bench = Bench(server, ranks, http)
            if ready:
                await ranks.all_ready()
                await until(lambda: server.state == "ready")
            yield bench
    finally:
        await server.stop()
        await ranks.close()


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Waits for what another task brings about."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - conditions span sockets, servers and tasks
            await asyncio.sleep(0.002)
