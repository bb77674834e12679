"""Regular answers, read by ``scan.c``: at a tenth of the price of doing it in Python.

``answers.py`` and ``openai_api.Answer`` say what an answer means; this is the same for the answers that are as they
should be, which nearly all are. ``Scanner.scan`` returns None for any other, and ``answers.py`` finds out what is in
it. ctypes, as in ``receive/native.py``.

Read next: ``answers.py``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.loadgen.compiled import Signatures, load
from toolkit.loadgen.exchange import Exchange, Spool
from toolkit.loadgen.http1 import EVENT_STREAM, FramingError, Head, parse_head
from toolkit.loadgen.openai_api import Answer

SOURCE = Path(__file__).with_name("scan.c")


class Scan(ctypes.Structure):
    """The part of ``struct scan`` that is for others."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "kernel_ns", "read_ns", "ends")),
        *((name, ctypes.c_int64) for name in ("size", "reads")),
        *((name, ctypes.c_void_p) for name in ("chunk_s", "chunk_tokens", "text", "finish")),
        *((name, ctypes.c_int64) for name in ("chunks", "text_size", "finish_size")),
        *((name, ctypes.c_int64) for name in ("prompt_tokens", "cached_tokens", "reasoning_tokens")),
        *((name, ctypes.c_int64) for name in ("completion_tokens", "first_visible_ns", "shared", "late")),
        *((name, ctypes.c_int32) for name in ("done", "counted_each")),
    )


class Seen(NamedTuple):
    """What there is to know of an answer beside ``Answer``.

    Attributes:
        kernel_ns, read_ns: of each read.
        shared: events with tokens that came in one read with the one before; ``late``: those of them read late.
        fault: what is wrong with the answer.
    """

    head: Head | None
    kernel_ns: NDArray[np.int64]
    read_ns: NDArray[np.int64]
    shared: int
    late: int
    fault: str = ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """``scan.c``, compiled; None where it cannot be."""
    long, number, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    signatures: Signatures = {
        "scan_new": (ctypes.POINTER(Scan),),
        "scan_delete": (None, pointer),
        "scan_load": (long, pointer, number, pointer, number),
        "scan_events": (number, pointer, long, number, long, long),
    }
    return load(SOURCE, signatures)


class Scanner:
    """Reads answers out of a spool, one at a time.

    Args:
        blur_ns: a read that came so much after the kernel had its bytes counts as late.
    """

    def __init__(self, lib: ctypes.CDLL, spool: Spool, blur_ns: int) -> None:
        self._lib = lib
        self._spool = spool
        self._blur_ns = blur_ns
        self._scan = lib.scan_new()
        if not self._scan:
            raise MemoryError("no memory to read answers")

    def close(self) -> None:
        self._lib.scan_delete(self._scan)
        self._scan = None

    def scan(self, exchange: Exchange, answer: Answer) -> Seen | None:
        """Fills the answer. None: it is not regular, and nothing is in ``answer``."""
        if exchange.reads:
            return None  # not in the spool
        segments = array("q", itertools.chain.from_iterable(exchange.segments))
        lib, scan = self._lib, self._scan
        head_end = lib.scan_load(scan, self._spool.fd, segments.buffer_info()[0], len(exchange.segments))
        if head_end < 0:
            return None
        found: Scan = scan.contents
        try:
            head = parse_head(ctypes.string_at(found.data, head_end))
        except FramingError:
            return None
        if head.status != 200 or head.content_type != EVENT_STREAM:
            return None
        if not lib.scan_events(scan, head_end + 4, head.chunked, exchange.sent_ns, self._blur_ns):
            return None
        answer.chunk_at = _column(found.chunk_s, found.chunks, np.float64).tolist()
        answer.chunk_tokens = _column(found.chunk_tokens, found.chunks).tolist()
        answer.texts = [ctypes.string_at(found.text, found.text_size).decode()]
        answer.finish_reason = ctypes.string_at(found.finish, found.finish_size).decode() if found.finish_size else ""
        answer.done = bool(found.done)
        answer.prompt_tokens, answer.cached_tokens = found.prompt_tokens, found.cached_tokens
        answer.reasoning_tokens, answer.completion_tokens = found.reasoning_tokens, found.completion_tokens
        answer.counted_each = bool(found.counted_each)
        if found.first_visible_ns:
            answer.first_visible_at = (found.first_visible_ns - exchange.sent_ns) * 1e-9
        kernel_ns, read_ns = _column(found.kernel_ns, found.reads), _column(found.read_ns, found.reads)
        return Seen(head, kernel_ns, read_ns, found.shared, found.late)


def _column(at: int, count: int, kind: type[np.int64] | type[np.float64] = np.int64) -> NDArray[np.int64]:
    return np.frombuffer(ctypes.string_at(at, 8 * count), kind)
