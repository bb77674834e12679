"""What passes between the parts of a load generator process: a call to be sent, and what was seen of it.

An exchange is raw: bytes and when each read brought them. Nothing in it is interpreted before the load point has
ended (``answers.py`` does that), so that taking a stamp costs as little as possible.
Read next: ``sockets.py``, which fills it.
"""

from __future__ import annotations

import asyncio
import os
import struct
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import time_ns
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.records.requests import CUT_OFF

STAMP = np.dtype([("s", "<i8"), ("ns", "<i8")])  # struct timespec, as SO_TIMESTAMPNS gives it
TIMESPEC = struct.Struct("=qq")
READ_BYTES = 28  # of the spool that a read takes beside its data: stamp, time, size
SPILL_BYTES = 1 << 14  # of one answer kept in memory: bounds a process's size by its streams, not by their length

Outcome = Literal["ended", "error", "timeout", "cancelled", "interrupted"]


class Call(msgspec.Struct, frozen=True):
    """One request to be sent; ``offset`` and ``length`` say where its JSON body is in the point's file of bodies.

    Attributes:
        at_s: when it is due, seconds after the point's begin; -1: as soon as a slot is free.
        session: names the conversation it is a turn of; empty: none. Turns of one are sent in order, on one connection.
        more_turns: another turn of it follows.
        think_s: pause before this turn, after the answer to the one before.
        cancel_s: the client gives it up so long after sending; 0: it does not.
    """

    request_id: str
    prompt_id: str
    warmup: bool
    expected_output_tokens: int
    offset: int
    length: int
    at_s: float = -1.0
    session: str = ""
    turn: int = 0
    more_turns: bool = False
    think_s: float = 0.0
    cancel_s: float = 0.0


class Exchange:
    """One call and everything that was seen of it. Times are CLOCK_REALTIME nanoseconds, 0: did not happen.

    Attributes:
        due_ns: when the call should have been sent.
        sent_ns: just before the request's last byte was written.
        reads: what is in memory, one entry a read: when the process had it, its ``STAMP`` as bytes (when the kernel
            received the last of its bytes; the process's own time where it does not say), the bytes.
        held: bytes in ``reads``.
        segments: what is in the spool: (offset, bytes, reads).
        last_read_ns: the stamp of the last read in the spool.
        resent: times it was sent again because an idle connection turned out to be closed; nothing had come then.
        refused: the answer is not a 200, as far as its first bytes show.
        unreachable: no connection could be opened.
    """

    __slots__ = (
        "call", "due_ns", "ended_ns", "fault", "held", "kernel_stamped", "last_read_ns", "outcome", "reads", "refused",
        "resent", "segments", "sent_ns", "unreachable",
    )  # fmt: skip

    def __init__(self, call: Call, due_ns: int) -> None:
        self.call = call
        self.due_ns = due_ns
        self.sent_ns = 0
        self.ended_ns = 0
        self.outcome: Outcome = "ended"
        self.fault = ""
        self.resent = 0
        self.unreachable = False
        self.refused = True
        self.kernel_stamped = True
        self.last_read_ns = 0
        self.reads: list[tuple[int, bytes, bytes]] = []
        self.held = 0
        self.segments: list[tuple[int, int, int]] = []

    def fail(self, outcome: Outcome, fault: str) -> None:
        self.outcome, self.fault = outcome, fault

    @property
    def last_ns(self) -> int:
        """When the answer had ended, by the kernel's clock: a loop that notices it late moves nothing.

        Everything that came has to be in the spool.
        """
        return self.last_read_ns or self.ended_ns if self.outcome == "ended" else self.ended_ns

    @property
    def empty(self) -> bool:
        """Nothing of an answer has come."""
        return not self.reads and not self.segments


class Raw:
    """The bytes of an exchange and, for each read, when the kernel and the process had it and where it ended."""

    def __init__(self, data: bytes, kernel_ns: NDArray[np.int64], read_ns: NDArray[np.int64], ends: NDArray[np.int64]):
        self.data = data
        self.kernel_ns = kernel_ns
        self.read_ns = read_ns
        self.ends = ends

    def parts(self) -> list[bytes]:
        """The bytes of each read."""
        ends = self.ends.tolist()
        return [self.data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


class Spool:
    """A file that takes answers out of memory while a point runs, and gives them back afterwards."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        path.unlink()  # it lives as long as this process has it open, however that ends
        self._end = 0

    def put(self, exchange: Exchange) -> None:
        """Moves what the exchange holds into the file."""
        reads = exchange.reads
        if not reads:
            return
        parts = _columns(reads)
        size = sum(memoryview(part).nbytes for part in parts)
        written = os.writev(self.fd, parts)
        if written != size:  # a full disk
            raise OSError(f"{written} of {size} bytes of answers could be written to the temporary folder")
        seconds, rest = TIMESPEC.unpack(reads[-1][1])
        exchange.last_read_ns = int(seconds) * 1_000_000_000 + int(rest)
        self.wrote(exchange, len(parts[0]), len(reads))
        exchange.reads, exchange.held = [], 0

    def wrote(self, exchange: Exchange, size: int, reads: int) -> None:
        """A segment of ``reads`` reads with ``size`` bytes of data is in the file: data, stamps, times, sizes."""
        exchange.segments.append((self._end, size, reads))
        self._end += size + reads * READ_BYTES

    def get(self, exchange: Exchange) -> Raw:
        """Everything that came for the exchange, in order."""
        blocks = [(os.pread(self.fd, size + n * READ_BYTES, at), size, n) for at, size, n in exchange.segments]
        if exchange.reads:
            parts = _columns(exchange.reads)
            blocks.append((b"".join(parts), len(parts[0]), len(exchange.reads)))
        if not blocks:
            none = np.empty(0, np.int64)
            return Raw(b"", none, none, none)
        stamps = np.concatenate([np.frombuffer(block, STAMP, n, size) for block, size, n in blocks])
        reads = np.concatenate([np.frombuffer(block, "<i8", n, size + n * 16) for block, size, n in blocks])
        sizes = np.concatenate([np.frombuffer(block, "<u4", n, size + n * 24) for block, size, n in blocks])
        data = b"".join([block[:size] for block, size, _ in blocks])
        return Raw(data, stamps["s"] * 1_000_000_000 + stamps["ns"], reads, np.cumsum(sizes, dtype=np.int64))

    def clear(self) -> None:
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self._end = 0

    def close(self) -> None:
        os.close(self.fd)


def _columns(reads: list[tuple[int, bytes, bytes]]) -> tuple[bytes, bytes, array[int], array[int]]:
    """Reads -> all bytes, all stamps, all times, all sizes: a segment of the spool."""
    times, stamps, data = zip(*reads, strict=True)
    return b"".join(data), b"".join(stamps), array("q", times), array("I", map(len, data))


class Client(Protocol):
    """Sends calls; the seam between arrivals and transports (``sockets.py``, ``http_client.py``).

    Attributes:
        reads: reads that brought bytes so far: what a progress display can know before anything is parsed.
        opened: connections opened so far.
    """

    opened: int

    @property
    def reads(self) -> int: ...

    async def connect(self, count: int) -> None:
        """Opens connections until ``count`` are idle, so that none is opened while latencies are taken."""
        ...

    async def send(self, call: Call, body: bytes, due_ns: int) -> Exchange:
        """Sends ``call``, due at ``due_ns``, and returns when it has ended, well or not; raises only when cancelled.

        Every call ends in exactly one exchange, which ``on_done`` gets too, that of a cancelled one included.
        """
        ...

    async def close(self) -> None: ...


async def attempt(
    exchange: Exchange, talk: Callable[[], Awaitable[None]], timeout_s: float, failures: tuple[type[Exception], ...]
) -> None:
    """Runs ``talk``, which fills the exchange; however it ends, the exchange says so. Raises only when cancelled.

    Args:
        failures: what ``talk`` raises when the server or the connection fails; the text becomes the exchange's fault.
    """
    call = exchange.call
    exchange.sent_ns = time_ns()
    limit = min(timeout_s, call.cancel_s or timeout_s)
    try:
        async with asyncio.timeout(limit):
            await talk()
    except TimeoutError:
        if limit == call.cancel_s:
            exchange.fail("cancelled", f"given up after {limit:g} s, as cancel_fraction asks")
        else:
            exchange.fail("timeout", f"no complete answer after timeout_s={limit:g}")
    except asyncio.CancelledError:
        exchange.fail("interrupted", CUT_OFF)
        raise
    except failures as error:
        exchange.fail("error", str(error) or type(error).__name__)
        exchange.unreachable = isinstance(error, UnreachableError)
    finally:
        exchange.ended_ns = time_ns()


class UnreachableError(OSError):
    """No connection could be opened."""


OnDone = Callable[[Exchange], None]
Send = Callable[[Call, int], Awaitable[Exchange]]
"""(call, when it was due, CLOCK_REALTIME ns) -> what was seen of it, when it has ended."""
