"""Exchange -> ``RequestRecord``: what the bytes of an answer say, and when it was known.

Runs after the load point, or for a turn of a conversation when it has ended. A stamp is that of the read that
completed an event: events of one read have one stamp. Derived latencies are not computed here (analysis/metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from toolkit.loadgen.exchange import Exchange, Raw
from toolkit.loadgen.http1 import FramingError, Head, open_answer, plain_stream
from toolkit.loadgen.openai_api import ERROR_CHARS, Answer, AnswerError, error_message
from toolkit.loadgen.sse import SSEParser
from toolkit.records.requests import RequestRecord

FAILED_FINISHES = ("abort", "error")
BLUR_NS = 2_000_000  # a read that came later than this after the kernel had its bytes may be why they came together


class Coalesced(NamedTuple):
    """How many events with tokens came in one read with the one before: all of them, and those read late."""

    total: int
    late: int


def to_record(exchange: Exchange, raw: Raw, point: int, concurrency: int) -> tuple[RequestRecord, Coalesced]:
    """The row of one call, however it ended, and how many of its events came together."""
    record, answer, token_reads = _new_record(exchange, point, concurrency), Answer(), list[int]()
    try:
        plain = plain_stream(raw.data)
        head, pieces = (plain.head, []) if plain is not None else open_answer(raw.data)
        if head is None:
            raise AnswerError(exchange.fault or "the server closed the connection without an answer")
        record.http_status, record.dp_rank = head.status, _dp_rank(head.headers.get("x-dp-rank", ""))
        _refuse_other_than_stream(head, pieces)
        if plain is not None:
            reads = np.searchsorted(raw.ends, np.array(plain.ends, np.int64), "left")
            seconds = (raw.kernel_ns - exchange.sent_ns) * 1e-9
            token_reads += reads[answer.add_all(plain.events, seconds[reads].tolist())].tolist()
        else:
            _read_events(answer, pieces, raw, exchange.sent_ns, token_reads)
        _refuse_incomplete(answer, exchange)
        record.status, record.error = "ok", ""
    except ValueError as error:  # AnswerError, FramingError, an endless event
        told = f"malformed HTTP: {error}" if isinstance(error, FramingError) else str(error)
        record.status = "error" if exchange.outcome == "ended" else exchange.outcome
        record.error = (exchange.fault if record.status in ("timeout", "cancelled") else told)[:ERROR_CHARS]
    _fill(record, answer, raw, exchange)
    coalesced = _coalesced(token_reads, raw)
    record.coalesced = coalesced.total
    return record, coalesced


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


def _coalesced(token_reads: list[int], raw: Raw) -> Coalesced:
    reads = np.array(token_reads, np.int64)
    shared = reads[1:][reads[1:] == reads[:-1]]
    late = (raw.read_ns - raw.kernel_ns)[shared] > BLUR_NS
    return Coalesced(len(shared), int(late.sum()))


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
    kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if head.status == 200 and kind == "text/event-stream":
        return
    message = error_message(b"".join(data for data, _ in pieces)) or head.reason or "empty answer"
    if head.status == 200:
        raise AnswerError(f"content type {kind or 'unknown'} instead of text/event-stream: {message}")
    raise AnswerError(f"HTTP {head.status}: {message}")


def _refuse_incomplete(answer: Answer, exchange: Exchange) -> None:
    if answer.finish_reason in FAILED_FINISHES:
        raise AnswerError(f"the server ended the answer with finish_reason={answer.finish_reason}")
    if not answer.done and exchange.outcome != "ended":
        raise AnswerError(exchange.fault)
    if not answer.finished:
        raise AnswerError("the stream ended without a finish reason or [DONE]")
    if not answer.finish_reason and not answer.output_tokens:
        raise AnswerError("the stream held no token")


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


def _fill(record: RequestRecord, answer: Answer, raw: Raw, exchange: Exchange) -> None:
    """What is known when the call has ended, however it ended."""
    if len(raw.kernel_ns):
        record.first_byte_s = (int(raw.kernel_ns[0]) - exchange.sent_ns) * 1e-9
        if record.status == "ok":
            record.end_s = (int(raw.kernel_ns[-1]) - exchange.sent_ns) * 1e-9
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
