"""The wire between the node that leads a load generator and the worker groups of the other nodes.

Length-prefixed msgpack over TCP. What a worker process is told and reports (``wire.py``) passes through unchanged;
beside it go the files of a load point, so that the nodes need no shared folder. Nothing passes while a point runs but
a report of progress four times a second. Read next: ``groups.py`` (the leader's end), ``join.py`` (the other).
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Literal

import msgspec

from toolkit.loadgen.wire import Command, Report, Setup

TOKEN_ENV = "TOOLKIT_RUN_TOKEN"  # the secret of the run, in the environment of every node, never on a command line
PART_BYTES = 1 << 20
MAX_FRAME = 8 << 20
MAX_HELLO = 1 << 12
_LENGTH = struct.Struct("!I")

FileKind = Literal["calls", "bodies", "rows", "raw"]


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A group's first word. ``cores``: it may run on."""

    token: str
    host: str
    cores: int


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """What the group is to start."""

    setup: Setup
    workers: int
    pin: bool


class Refused(msgspec.Struct, tag="refused", frozen=True):
    reason: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    pass


class Pong(msgspec.Struct, tag="pong", frozen=True):
    time_ns: int


class Tell(msgspec.Struct, tag="tell", frozen=True):
    """For one of the group's workers."""

    worker: int
    command: Command


class Heard(msgspec.Struct, tag="heard", frozen=True):
    """From one of the group's workers."""

    worker: int
    report: Report


class Part(msgspec.Struct, tag="part", frozen=True):
    """The next bytes of a file of one worker's share of a point; the first part begins the file anew."""

    worker: int
    kind: FileKind
    data: bytes
    first: bool


Frame = Hello | Begin | Refused | Ping | Pong | Tell | Heard | Part


class LinkError(OSError):
    """The other end is gone, or does not speak this protocol."""


class Link:
    """One connection. ``send`` waits while the other end is slow."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = msgspec.msgpack.Decoder(Frame)

    async def send(self, frame: Frame) -> None:
        """Raises ``LinkError``."""
        try:
            self.post(frame)
            await self._writer.drain()
        except OSError as error:
            raise LinkError(f"the connection is gone: {error}") from None

    def post(self, frame: Frame) -> None:
        """Sends without waiting; for frames of a few bytes."""
        data = msgspec.msgpack.encode(frame)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def send_file(self, worker: int, kind: FileKind, path: Path) -> None:
        """The whole file; raises ``LinkError``."""
        with path.open("rb") as file:
            first = True
            while (data := file.read(PART_BYTES)) or first:
                await self.send(Part(worker, kind, data, first))
                first = False

    async def receive(self, limit: int = MAX_FRAME) -> Frame:
        """The next frame. Raises ``LinkError``, also for one longer than ``limit`` bytes."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > limit:
                raise LinkError(f"a frame of {length} bytes; at most {limit} are expected")
            frame: Frame = self._decoder.decode(await self._reader.readexactly(length))
            return frame
        except (asyncio.IncompleteReadError, ConnectionError):
            raise LinkError("the connection was closed") from None
        except msgspec.DecodeError as error:
            raise LinkError(f"not the load generator's protocol: {error}") from None

    def close(self) -> None:
        self._writer.close()


def write_part(path: Path, part: Part) -> None:
    """Adds a part to the file it belongs to."""
    with path.open("wb" if part.first else "ab") as file:
        file.write(part.data)


def parse_address(text: str, name: str) -> tuple[str, int]:
    """``HOST:PORT`` -> both. Raises ``ValueError`` that names the option."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ValueError(f"{name}={text} is not an address; give HOST:PORT, for example node1:7007")
    return host.strip("[]"), int(port)
