"""What the frontend's processes cost a token, alone and with API servers, in front of ranks that only send tokens.

    python -m tests.bench.frontend [--streams 256] [--step-ms 20] [--seconds 8] [--api-servers 1 2 4] [--disagg]

Ranks and clients are processes of their own; a stream asks for ``--osl`` tokens and begins anew. In a step each DP rank
sends one token of each of its requests in one message, as the engine does. Prints the tokens that reached clients, and
of each process of the frontend its share of a core and its CPU time for 1,000 tokens of all: what one process bears is
one core divided by that. The ways are taken in turn, ``--rounds`` times, so that a noisy machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import zmq

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.args import TOKEN_ENV, FrontendArgs, WorkerAddress
from toolkit.engine.messages import (
    Abort,
    Generate,
    Handover,
    Output,
    Outputs,
    Ready,
    Send,
    Ticket,
    decode_to_rank,
    encode,
)
from toolkit.launch import ports

TOKEN, DP = "bench", 4
MODEL = {
    "model_type": "mixtral", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1 << 20, "num_local_experts": 4, "num_experts_per_tok": 2,
    "intermediate_size": 16,
}  # fmt: skip


def ranks(first_port: int, inboxes: list[int], step_s: float) -> None:
    """All ranks: a token of every running request each step, on time or as soon as possible.

    With two inboxes the first is of a prefill worker of one rank, which answers at once; the KV is there as soon.
    """
    context = zmq.Context()
    ins = [context.socket(zmq.PULL) for _ in range(len(inboxes) - 1 + DP)]
    for rank, socket in enumerate(ins):
        socket.bind(f"tcp://127.0.0.1:{first_port + rank}")
    outs = [context.socket(zmq.PUSH) for _ in inboxes]
    for out, inbox, size in zip(outs, inboxes, (1, DP)[-len(inboxes) :]):
        out.set_hwm(0)
        out.connect(f"tcp://127.0.0.1:{inbox}")
        for rank in range(size):
            out.send_multipart(encode(Ready(rank, {"max_model_len": 1 << 20, "max_total_tokens": 1 << 30}), TOKEN))
    waiting: dict[str, int] = {}
    running: list[dict[str, int]] = [{} for _ in range(DP)]
    due = time.perf_counter()
    while True:
        for rank, socket in enumerate(ins, 1 - len(inboxes)):
            outputs = []
            while socket.poll(0):
                match decode_to_rank(socket.recv_multipart(), TOKEN):
                    case Generate(rid, prompt, _, send=Send(room)):
                        ticket = Ticket(room, len(prompt), [[0]], first_token=97)
                        outs[0].send_multipart(encode(Outputs(0, [Output(rid, [97], ticket=ticket)]), TOKEN))
                    case Generate(rid, _, sampling):
                        (waiting if len(inboxes) > 1 else running[rank])[rid] = sampling.max_tokens
                    case Handover(rid):
                        if rid in waiting:
                            outputs.append(Output(rid, [], joined=True))
                            running[rank][rid] = waiting.pop(rid) - 1
                    case Abort(rid):
                        for held in (waiting, *running):
                            held.pop(rid, None)
            for rid, left in list(running[rank].items()) if rank >= 0 else ():
                outputs.append(Output(rid, [97 + left % 26], None if left > 1 else "length"))
                if left > 1:
                    running[rank][rid] = left - 1
                else:
                    del running[rank][rid]
            if outputs:
                outs[-1].send_multipart(encode(Outputs(rank, outputs), TOKEN))
        due = max(due + step_s, time.perf_counter() - step_s)
        time.sleep(max(0.0, due - time.perf_counter()))


def clients(port: int, streams: int, osl: int, tokens: Synchronized[int]) -> None:
    body = json.dumps({"prompt": "x" * 64, "max_tokens": osl, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def stream() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        while True:
            writer.write(head + body)
            while True:
                data = await reader.read(1 << 16)
                assert data, "the server closed a connection"
                count = data.count(b'"text":')
                with tokens.get_lock():
                    tokens.value += count
                if b"[DONE]" in data:
                    break
            await asyncio.sleep(0.001)  # the end of the chunked answer

    async def run() -> None:
        await asyncio.gather(*(stream() for _ in range(streams)))

    asyncio.run(run())


@contextlib.contextmanager
def serving(api_servers: int, args: argparse.Namespace, tokens: Synchronized[int]) -> Iterator[psutil.Process]:
    """A frontend under load."""
    first = ports.free_range(DP + 4)
    pools: list[tuple[Literal["agg", "prefill", "decode"], int]]
    pools = [("prefill", 1), ("decode", DP)] if args.disagg else [("agg", DP)]
    workers: list[WorkerAddress] = []
    port = first
    for pool, size in pools:
        parallel = ParallelConfig(tp_size=size, dp_size=size, ep_size=size, enable_dp_attention=size > 1)
        inbox = ("127.0.0.1", first + DP + 1 + len(workers))
        rank_inboxes = [("127.0.0.1", port + rank) for rank in range(size)]
        workers.append(WorkerAddress(pool, pool, parallel, inbox, rank_inboxes))
        port += size
    http = first + DP + 3
    model = ModelConfig(name="tiny", hf_config=MODEL, tokenizer=args.tokenizer, load_format="dummy")
    frontend = FrontendArgs(
        model, EngineConfig(max_queued_requests=1 << 16), ("127.0.0.1", http), workers, api_servers=api_servers
    )
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(
            target=ranks, args=(first, [worker.inbox[1] for worker in workers], args.step_ms / 1e3), daemon=True
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "args.json")
        file.write_bytes(msgspec.json.encode(frontend))
        command = [sys.executable, "-m", "toolkit.engine.frontend", "--args", str(file)]
        process = subprocess.Popen(command, env=os.environ | {TOKEN_ENV: TOKEN}, stdout=subprocess.DEVNULL)
        try:
            others[0].start()
            wait_ready(f"http://127.0.0.1:{http}/health")
            others.append(context.Process(target=clients, args=(http, args.streams, args.osl, tokens), daemon=True))
            others[1].start()
            yield psutil.Process(process.pid)
        finally:
            for other in others:
                other.kill()
                other.join()
            process.terminate()
            process.wait()


def wait_ready(url: str) -> None:
    while True:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)


def measure(api_servers: int, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Tokens/s that clients got, and CPU ms for 1,000 of them: of the frontend, then of its API servers together."""
    tokens: Synchronized[int] = multiprocessing.get_context("spawn").Value("q", 0)
    with serving(api_servers, args, tokens) as frontend:
        while tokens.value < 2 * args.streams:
            time.sleep(0.05)
        groups = [[frontend], frontend.children()]

        def cpu() -> list[float]:
            return [sum(sum(process.cpu_times()[:2]) for process in group) for group in groups]

        before, count, since = cpu(), tokens.value, time.perf_counter()
        time.sleep(args.seconds)
        after, count, lasted = cpu(), tokens.value - count, time.perf_counter() - since
    return count / lasted, [(b - a) / count * 1e6 for a, b in zip(before, after)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="open at a time")
    parser.add_argument("--step-ms", type=float, default=20, help="between two tokens of a stream")
    parser.add_argument("--osl", type=int, default=200, help="tokens of a stream")
    parser.add_argument("--seconds", type=float, default=8, help="each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--api-servers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--disagg", action="store_true", help="with a prefill worker, which takes no time")
    parser.add_argument("--tokenizer", default="bytes", help="folder of a tokenizer; `bytes`: one token a byte")
    args = parser.parse_args()
    found: dict[int, list[tuple[float, list[float]]]] = {num: [] for num in args.api_servers}
    for _ in range(args.rounds):
        for num in args.api_servers:
            found[num].append(measure(num, args))
    offered = args.streams / args.step_ms * 1e3
    print(f"{args.streams} streams x {args.step_ms:g} ms: {offered:,.0f} tokens/s offered; medians of {args.rounds}")
    print(f"{'API servers':>11} {'tokens/s':>9} {'CPU ms / 1k tokens: frontend':>29} {'API servers':>12}  a core bears")
    for num, rounds in found.items():
        rate, lead, others = (statistics.median(figure) for figure in zip(*((r, *ms) for r, ms in rounds)))
        bears = 1e6 / max(lead, others / num) if num > 1 else 1e6 / lead
        print(f"{num:11} {rate:9,.0f} {lead:29.1f} {others:12.1f}  {bears:,.0f} tokens/s in all")


if __name__ == "__main__":
    main()
