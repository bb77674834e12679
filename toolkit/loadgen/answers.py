"""Exchange -> ``RequestRecord``: what the bytes of an answer say, and when it was known.

Runs after the load point, or for a turn of a conversation when it has ended. A stamp is that of the read that
completed an event: events of one read have one stamp. Derived latencies are not computed here (analysis/metrics.py).
What is done here for any answer, ``scan/`` does in C for the regular ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.loadgen.exchange import Exchange, Raw, Spool
from toolkit.loadgen.http1 import EVENT_STREAM, FramingError, Head, open_answer
from toolkit.loadgen.openai_api import ERROR_CHARS, Answer, AnswerError, error_message
from toolkit.loadgen.scan import Scanner, Seen, library
from toolkit.loadgen.sse import SSEParser
from toolkit.records.requests import RequestRecord

FAILED_FINISHES = ("abort", "error")
BLUR_NS = 2_000_000  # a read that came later than this after the kernel had its bytes may be why they came together


class Reading(NamedTuple):
    """The row of a call, and what it shows of the client.

    Attributes:
        lag_ns: of each read: how long the kernel had had its bytes.
        late: of the record's ``coalesced`` events, those that were read late.
    """

    record: RequestRecord
    lag_ns: NDArray[np.int64]
    late: int


class Reader:
    """Makes the rows of exchanges whose bytes are in ``spool``."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        compiled = library()
        self._scanner = None if compiled is None else Scanner(compiled, spool, BLUR_NS)

    def read(self, exchange: Exchange, point: int, concurrency: int) -> Reading:
        """The row of one call, however it ended."""
        record, answer = _new_record(exchange, point, concurrency), Answer()
        seen = self._scanner.scan(exchange, answer) if self._scanner is not None else None
        if seen is None:
            seen = read_any(exchange, self._spool.get(exchange), answer)
        if seen.head is not None:
            record.http_status, record.dp_rank = seen.head.status, _dp_rank(seen.head.headers.get("x-dp-rank", ""))
        if fault := seen.fault or _incomplete(answer, exchange):
            record.status = "error" if exchange.outcome == "ended" else exchange.outcome
            record.error = (fault if record.status == "error" else exchange.fault)[:ERROR_CHARS]
        else:
            record.status = "ok"
        _fill(record, answer, seen, exchange.sent_ns)
        return Reading(record, seen.read_ns - seen.kernel_ns, seen.late)

    def close(self) -> None:
        if self._scanner is not None:
            self._scanner.close()


def read_any(exchange: Exchange, raw: Raw, answer: Answer) -> Seen:
    """Fills the answer with what came, up to what is wrong with it."""
    head, token_reads, fault = None, list[int](), ""
    try:
        head, pieces = open_answer(raw.data)
        if head is None:
            raise AnswerError(exchange.fault or "the server closed the connection without an answer")
        _refuse_other_than_stream(head, pieces)
        _read_events(answer, pieces, raw, exchange.sent_ns, token_reads)
    except ValueError as error:  # AnswerError, FramingError, an endless event
        fault = f"malformed HTTP: {error}" if isinstance(error, FramingError) else str(error)
    reads = np.array(token_reads, np.int64)
    shared = reads[1:][reads[1:] == reads[:-1]]
    late = (raw.read_ns - raw.kernel_ns)[shared] > BLUR_NS
    return Seen(head, raw.kernel_ns, raw.read_ns, len(shared), int(late.sum()), fault)


def _read_events(
    answer: Answer, pieces: list[tuple[bytes, int]], raw: Raw, sent_ns: int, token_reads: list[int]
) -> None:
    """Feeds the answer until its [DONE], each event with the time of the read that completed it.

    Adds to ``token_reads`` the number of the read of each event that carried tokens.
    """
    parser, times, read = SSEParser(), ((raw.kernel_ns - sent_ns) * 1e-9).tolist(), 0
    for part, read in _by_read(pieces, raw.ends.tolist()):
        for event in parser.feed(part):
            if answer.add(event, times[read]):
                token_reads.append(read)
        if answer.done:
            return
    for event in parser.finish():
        if answer.add(event, times[read]):
            token_reads.append(read)


def _by_read(pieces: list[tuple[bytes, int]], ends: list[int]) -> Iterator[tuple[bytes, int]]:
    """The body's pieces, cut where a read ended, each with the number of its read."""
    read = 0
    for data, end in pieces:
        begin, at = end - len(data), 0  # of the piece in the raw bytes; how much of it has been given
        while data and ends[read] <= begin:
            read += 1
        while ends[read] < end:
            yield data[at : ends[read] - begin], read
            at = ends[read] - begin
            read += 1
        yield data[at:] if at else data, read


def _refuse_other_than_stream(head: Head, pieces: list[tuple[bytes, int]]) -> None:
    """Raises ``AnswerError`` with what the server said when the answer is not a 200 with an event stream."""
    kind = head.content_type
    if head.status == 200 and kind == EVENT_STREAM:
        return
    message = error_message(b"".join(data for data, _ in pieces)) or head.reason or "empty answer"
    if head.status == 200:
        raise AnswerError(f"content type {kind or 'unknown'} instead of text/event-stream: {message}")
    raise AnswerError(f"HTTP {head.status}: {message}")


def _incomplete(answer: Answer, exchange: Exchange) -> str:
    """Why an answer in which nothing is wrong is not one all the same; empty: it is."""
    if answer.finish_reason in FAILED_FINISHES:
        return f"the server ended the answer with finish_reason={answer.finish_reason}"
    if not answer.done and exchange.outcome != "ended":
        return exchange.fault
    if not answer.finished:
        return "the stream ended without a finish reason or [DONE]"
    if not answer.finish_reason and not answer.output_tokens:
        return "the stream held no token"
    return ""


def _new_record(exchange: Exchange, point: int, concurrency: int) -> RequestRecord:
    """The row of a call of which nothing is known yet but that it was sent, or was to be."""
    call, sent = exchange.call, exchange.sent_ns
    return RequestRecord(
        point=point, concurrency=concurrency, request_id=call.request_id, prompt_id=call.prompt_id, warmup=call.warmup,
        status="error", error="", http_status=0, t_send=sent * 1e-9,
        scheduled_s=min(0.0, (exchange.due_ns - sent) * 1e-9),
        first_byte_s=math.nan, first_token_s=math.nan, last_token_s=math.nan, end_s=(exchange.ended_ns - sent) * 1e-9,
        prompt_tokens=0, cached_tokens=0, output_tokens=0, expected_output_tokens=call.expected_output_tokens,
        finish_reason="", dp_rank=-1, chunk_s=[], chunk_tokens=[], output_text="",
        session=call.session, turn=call.turn, resent=exchange.resent,
    )  # fmt: skip


def _fill(record: RequestRecord, answer: Answer, seen: Seen, sent_ns: int) -> None:
    """What is known when the call has ended, however it ended."""
    if len(seen.kernel_ns):
        record.first_byte_s = (int(seen.kernel_ns[0]) - sent_ns) * 1e-9
        if record.status == "ok":
            record.end_s = (int(seen.kernel_ns[-1]) - sent_ns) * 1e-9
    record.coalesced = seen.shared
    record.chunk_s, record.chunk_tokens = answer.chunk_at, answer.chunk_tokens
    if answer.chunk_at:
        record.first_token_s, record.last_token_s = answer.chunk_at[0], answer.chunk_at[-1]
    record.first_visible_s = answer.first_visible_at
    record.prompt_tokens, record.cached_tokens = answer.prompt_tokens, answer.cached_tokens
    record.output_tokens, record.reasoning_tokens = answer.output_tokens, answer.reasoning_tokens
    record.token_source = answer.token_source
    record.finish_reason = answer.finish_reason
    record.output_text = "".join(answer.texts)


def _dp_rank(header: str) -> int:
    return int(header) if header.isascii() and header.isdigit() else -1
