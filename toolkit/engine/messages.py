"""Wire types between the frontend and the ranks, and their encoding.

MessagePack by msgspec: a message that does not match its type is refused, nothing is ever unpickled.
Every frame carries the run's token; a frame without it is dropped. Sockets are ZeroMQ PUSH -> PULL:
each rank binds its inbox, the frontend binds one inbox for all ranks.

Every message of the frontend goes to its addressee, and a ``Wake`` to every other rank of the worker,
because all ranks must take part in the step that follows (worker.py, "agree").
Read next: ``worker.py`` or ``frontend/server.py``.
"""

from __future__ import annotations

import hmac
from typing import Any, Literal, TypeVar

import msgspec

from toolkit.engine.core import FinishReason, SamplingParams, TokenLogprobs

# --- frontend -> rank -------------------------------------------------------------------------------


class Ticket(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a prefill rank says of KV blocks that can be read from it.

    Attributes:
        num_tokens: leading tokens of the prompt whose KV is there.
        blocks: of each kind of layer, the block of each ``page_size`` of them; -1 where a window has moved on.
        epoch: another one than before: what was read by earlier tickets of the request holds no longer.
        first_token: sampled after the whole prompt; None: more tickets follow.
        queue_s, prefill_s: how long the request waited there, and was computed.
    """

    room: int
    num_tokens: int
    blocks: list[list[int]]
    epoch: int = 0
    first_token: int | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0


class Send(msgspec.Struct, frozen=True):
    """Of a request to a prefill worker: it ends with its first token and a ticket, and keeps its blocks.

    ``early``: also a ticket after each chunk of the prompt. ``room`` names the pair of requests, here and there.
    """

    room: int
    early: bool


class Receive(msgspec.Struct, frozen=True):
    """Of a request to a decode worker: its prompt's KV is read from the DP group whose ranks gave ``peers`` (Ready.kv).

    ``ticket``: None: tickets come as ``Handover``.
    """

    room: int
    peers: list[bytes]
    ticket: Ticket | None = None


class Generate(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Start a request; answered by ``Outputs`` until one carries a finish reason.

    ``generated``: so many tokens at the end of ``prompt`` are output that another worker has given.
    """

    rid: str
    prompt: list[int]
    sampling: SamplingParams
    generated: int = 0
    send: Send | None = None
    receive: Receive | None = None


class Handover(msgspec.Struct, tag=True, frozen=True):
    """A ticket for a request that came without a final one."""

    rid: str
    ticket: Ticket


class Abort(msgspec.Struct, tag=True, frozen=True):
    """The client went away: drop the request. Unknown ids are ignored. Not answered."""

    rid: str


ControlOp = Literal[
    "flush_cache", "start_experts", "stop_experts", "dump_experts", "slow_down", "start_profile", "stop_profile",
    "rebalance_experts", "shutdown",
]  # fmt: skip


class Control(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """An operation on a rank, sent to every rank alike and answered by one ``ControlReply`` from each.

    Attributes:
        sleep_s: of slow_down: seconds before each forward pass; 0: none.
        folder: of start_profile: name of the folder for its files.
        num_steps: of start_profile: ends by itself after so many forward passes; 0: with stop_profile.
        since: of dump_experts: Unix seconds from which windows are in the dump.
        placement: of rebalance_experts: where experts are to go, as JSON; empty: what suits the counts.
    """

    cid: str
    op: ControlOp
    sleep_s: float = 0.0
    folder: str = ""
    num_steps: int = 0
    since: float = 0.0
    placement: str = ""


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Another rank of this worker has something to do."""


ToRank = Generate | Abort | Handover | Control | Wake

# --- rank -> frontend -------------------------------------------------------------------------------


class Progress(msgspec.Struct, tag=True, frozen=True):
    """Start-up progress of a rank: ``done`` of ``total`` in ``stage`` (connect, load, warm-up)."""

    rank: int
    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """A rank can take requests. ``info``: max_model_len, max_total_tokens, memory by kind in bytes, ...

    ``kv``: of a prefill rank, what a peer needs to read its KV cache.
    """

    rank: int
    info: dict[str, Any]
    kv: bytes = b""


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request. ``finish`` ends it; ``error`` says why when finish is "error".

    Where the request asked for them: ``logprobs``, one a token, and with the first token ``prompt_logprobs``, of all
    prompt tokens but the first, which follows nothing.

    In disaggregated serving: ``ticket`` of a prefill rank; ``joined``: the decode rank has the prompt's KV, and
    generates; ``retry`` of an error: it came from the way, another try may do better.
    """

    rid: str
    token_ids: list[int]
    finish: FinishReason | None = None
    cached_tokens: int = 0
    error: str = ""
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    ticket: Ticket | None = None
    joined: bool = False
    retry: bool = False


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """All new tokens of one step of one DP rank."""

    dp_rank: int
    outputs: list[Output]


class EplbStats(msgspec.Struct, frozen=True):
    """Rebalancing of experts, as the first rank knows it. Counters (``*_total``) never fall.

    Attributes:
        state: waiting for the next look; planning; moving ``chunk`` of ``chunks``; broken: see ``reason``.
        pause_s_total: what steps waited for. moved_slots_total: slots that got an expert from another rank.
        skipped_total: looks that ended without a rebalance: balanced, within noise, or above the threshold.
        balancedness_measured: of the rows that ranks received, at the last look.
        balancedness_before, balancedness_after: of the last rebalance, for the counts that it was planned from.
    """

    state: Literal["waiting", "planning", "moving", "broken"] = "waiting"
    reason: str = ""
    chunk: int = 0
    chunks: int = 0
    rebalances_total: int = 0
    aborted_total: int = 0
    skipped_total: int = 0
    moved_slots_total: int = 0
    same_node_bytes_total: int = 0
    cross_node_bytes_total: int = 0
    pause_s_total: float = 0.0
    balancedness_measured: float = float("nan")
    balancedness_before: float = float("nan")
    balancedness_after: float = float("nan")


class Stats(msgspec.Struct, tag=True, frozen=True):
    """State of one DP rank, sent at most a few times a second.

    Counters (``*_total``) never fall. ``balancedness`` is mean over layers of mean/max GPU load in the last
    recorder window, sent by rank 0, NaN elsewhere or before the first window.
    """

    dp_rank: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_total_tokens: int
    steps_total: int
    step_s_total: float
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    balancedness: float
    eplb: EplbStats | None = None  # from the first rank, where enable_eplb


class ControlReply(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """``refused``: not ok because of the state that the rank is in; otherwise something broke. ``detail`` says what."""

    cid: str
    rank: int
    ok: bool
    detail: str = ""
    refused: bool = False


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A rank cannot go on; sent before it exits."""

    rank: int
    error: str


ToFrontend = Progress | Ready | Outputs | Stats | ControlReply | Failed

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_to_frontend: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)


def encode(message: ToRank | ToFrontend, token: str) -> list[bytes]:
    """The frames of one multipart message."""
    return [token.encode(), _encoder.encode(message)]


def decode_to_rank(frames: list[bytes], token: str) -> ToRank:
    """Raises ``ValueError`` when the token is wrong or the message malformed."""
    return _decode(_to_rank, frames, token)


def decode_to_frontend(frames: list[bytes], token: str) -> ToFrontend:
    """Raises ``ValueError`` when the token is wrong or the message malformed."""
    return _decode(_to_frontend, frames, token)


def _decode(decoder: msgspec.msgpack.Decoder[M], frames: list[bytes], token: str) -> M:
    if len(frames) != 2 or not hmac.compare_digest(frames[0], token.encode()):
        raise ValueError("message without the token of this run: dropped")
    return decoder.decode(frames[1])  # msgspec.ValidationError and DecodeError are ValueErrors
