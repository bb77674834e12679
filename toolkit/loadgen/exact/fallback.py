"""The exact-schedule server in Python, where ``server.c`` cannot be compiled: same arguments, schedule and log."""

from __future__ import annotations

import array
import asyncio
import re
import signal
import struct
import sys
import time
from pathlib import Path
from typing import BinaryIO

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1760000000,"model":"exact",'
    '"choices":[{"index":0,"delta":{"content":" tok%d"},"finish_reason":%s}],'
    '"usage":{"prompt_tokens":16,"completion_tokens":%d,"total_tokens":%d}}\n\n'
)
TAIL = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Server:
    """Answers every connection's requests, one after the other."""

    def __init__(self, ttft_us: int, itl_us: int, grid_us: int, log: BinaryIO) -> None:
        self._ttft_ns, self._itl_ns, self._grid_ns = ttft_us * 1000, itl_us * 1000, grid_us * 1000
        self._log = log
        self._numbered = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                arrived = time.time_ns()
                length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith(b"POST"):
                    await self._stream(writer, arrived, body)
                else:
                    _reply(writer, b'{"data":[{"id":"exact"}]}' if b"/v1/models" in head else b"{}")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, arrived: int, body: bytes) -> None:
        wanted = re.search(rb'"max_tokens": *(\d+)', body)
        count = max(1, int(wanted[1])) if wanted else 16
        factor = 0.5 + (self._numbered * 2654435761 % 4096) / 4096
        self._numbered += 1
        due = self._on_grid(arrived + int(self._ttft_ns * factor))
        writer.write(HEAD)
        sent = array.array("q")
        for number in range(count):
            await asyncio.sleep((due - time.time_ns()) * 1e-9)
            last = number + 1 == count
            event = EVENT % (number, '"length"' if last else "null", number + 1, number + 17)
            sent.append(time.time_ns())
            writer.write(b"%x\r\n%s\r\n%s" % (len(event), event.encode(), TAIL if last else b""))
            due = self._on_grid(due + self._itl_ns)
        self._log.write(struct.pack("<qq", arrived, count) + sent.tobytes())

    def _on_grid(self, when: int) -> int:
        return -(-when // self._grid_ns) * self._grid_ns if self._grid_ns else when


def _reply(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def main(words: list[str]) -> None:
    ttft_us, itl_us, grid_us, path = *map(int, words[:3]), Path(words[3])
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with path.open("wb") as log:
        server = await asyncio.start_server(Server(ttft_us, itl_us, grid_us, log).serve, "127.0.0.1", 0, backlog=4096)
        sys.stdout.write(f"PORT {server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await stop.wait()
        server.close()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1:]))
