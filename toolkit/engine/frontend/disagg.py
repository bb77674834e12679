"""DisaggFlight: a request that is prefilled by one worker and decoded by another, as one request to its client.

The prefill worker computes the prompt and one token and answers with a ticket; the decode worker reads the KV and goes
on. ``bootstrap``: both get the request at once, under one room number, and the reads begin with the first chunk;
``synchronous``: the decode worker is chosen when the prompt is done. The first token goes to the client when the decode
worker has joined it to its batch. When a worker or a transfer fails the request begins anew elsewhere, with the tokens
that the client has already; it never does after a cancel. Knows no HTTP. Read next: ``ranks.py``, ``fleet.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.flight import Sink
from toolkit.engine.messages import Generate, Output, Receive, Send

if TYPE_CHECKING:
    from toolkit.engine.frontend.fleet import Unit

log = logging.getLogger(__name__)


class Pick(Protocol):
    def __call__(self, tokens: list[int], avoid: Collection[Unit] = ()) -> Unit | None: ...


class Handoffs:
    """What all requests share.

    Args:
        enforce: refuse requests while no prefill worker lives; False: decode workers prefill them.
        migration_limit: how often one request may begin anew.
    """

    def __init__(
        self,
        prefill: Pick,
        decode: Pick,
        handoff: Literal["bootstrap", "synchronous"],
        enforce: bool,
        migration_limit: int,
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.early, self.enforce, self.migration_limit = handoff == "bootstrap", enforce, migration_limit
        self.num_open = 0
        self.attempts = itertools.count()
        self.warned = False


@dataclass
class Job:
    """One request and what has become of it."""

    rid: str
    tokens: list[int]  # prompt and what the client has
    sampling: SamplingParams
    generated: int = 0
    cached: int = 0


class Lost(Exception):
    """The attempt failed, another may not."""


class Refused(Exception):
    """The request cannot be served."""


@dataclass
class Leg:
    """One side of an attempt, which takes its outputs."""

    unit: Unit
    rid: str
    attempt: Attempt
    started: bool = field(default=False)

    def put(self, output: Output) -> None:
        self.attempt.take(self, output)

    def start(self, request: Generate) -> None:
        self.started = True
        self.unit.client.start(self, self.unit.dp_rank, request)

    def end(self) -> None:
        """Aborts what has not ended."""
        if self.started:
            self.unit.client.abort(self.rid)


class Attempt:
    """A request, or what is left of it, on one pair of workers; ``prefill`` None: on the decode worker alone.

    Outputs are passed on as they come: a token costs no turn of the event loop.
    """

    def __init__(self, handoffs: Handoffs, job: Job, prefill: Unit | None, decode: Unit, sink: Sink) -> None:
        self._handoffs, self._job, self._sink = handoffs, job, sink
        rid = f"{job.rid}@{next(handoffs.attempts)}"
        self._decode = Leg(decode, rid, self)
        self._prefill = None if prefill is None else Leg(prefill, rid, self)
        self._first: Output | None = None  # the prefill worker's token, until the decode worker has joined
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """To the last output. ``Lost``, ``Refused``."""
        try:
            if self._prefill is None:
                self._start_alone()
            else:
                self._start_pair(self._prefill)
            await self._over
        finally:
            self._over.cancel()  # what still comes is of no matter
            for leg in (self._decode, self._prefill):
                if leg is not None:
                    leg.end()

    def take(self, leg: Leg, output: Output) -> None:
        """An output of either side."""
        if self._over.done():
            return
        try:
            self._take(leg, output)
        except Exception as error:
            self._over.set_exception(error)

    def _take(self, leg: Leg, output: Output) -> None:
        if output.finish in ("error", "abort"):
            reason = f"{leg.unit.client.name}: {output.error or 'the request was aborted by its rank'}"
            raise Lost(reason) if output.retry else Refused(reason)
        if leg is self._prefill and output.finish is None:
            self._first = output if output.token_ids else self._first
            self._pass_on(leg, output)
        elif output.joined:
            assert self._first is not None and self._prefill is not None, output
            self._prefill.unit.client.forget(self._prefill.rid)  # its blocks are the reader's to release
            self._give(msgspec.structs.replace(self._first, ticket=None, finish=output.finish))
        else:  # of a prefill worker: its first token is its last
            self._give(output)
        if output.finish is not None:
            self._over.set_result(None)

    def _start_alone(self) -> None:
        if self._handoffs.enforce:
            raise Refused("no prefill worker lives, and deploy.enforce_disagg=true does without none")
        if not self._handoffs.warned:
            self._handoffs.warned = True
            log.warning("no prefill worker lives: decode workers compute prompts (deploy.enforce_disagg=false)")
        self._decode.start(self._request(self._decode))

    def _start_pair(self, prefill: Leg) -> None:
        self._handoffs.warned = False
        room, early = secrets.randbits(62), self._handoffs.early
        if early:
            self._decode.start(self._request(self._decode, receive=Receive(room, _kv(prefill.unit))))
        prefill.start(self._request(prefill, send=Send(room, early)))

    def _request(self, leg: Leg, send: Send | None = None, receive: Receive | None = None) -> Generate:
        """The prompt is scored once; a request that begins anew has its scores."""
        job = self._job
        sampling = msgspec.structs.replace(job.sampling, prompt_logprobs=None) if job.generated else job.sampling
        return Generate(leg.rid, list(job.tokens), sampling, job.generated, send, receive)

    def _pass_on(self, prefill: Leg, output: Output) -> None:
        """The prefill worker's ticket to the decode worker."""
        ticket = output.ticket
        assert ticket is not None, output
        if self._decode.started:
            self._decode.unit.client.hand_over(self._decode.rid, ticket)
        else:
            self._decode.start(self._request(self._decode, receive=Receive(ticket.room, _kv(prefill.unit), ticket)))

    def _give(self, output: Output) -> None:
        """New tokens for the client."""
        job = self._job
        job.cached = max(job.cached, 0 if job.generated else output.cached_tokens)
        job.tokens += output.token_ids
        job.generated += len(output.token_ids)
        self._sink.put(msgspec.structs.replace(output, rid=job.rid, cached_tokens=job.cached))


def _kv(unit: Unit) -> list[bytes]:
    return unit.client.kv_of(unit.dp_rank)


class DisaggFlight:
    """Requests of one prompt. A ``flight.Flight``; ``close`` it."""

    def __init__(self, handoffs: Handoffs, prompt: list[int], sink: Sink) -> None:
        self._handoffs, self._prompt, self._sink = handoffs, prompt, sink
        # Chosen now because the answer's headers name it; an attempt may have to take another.
        self._unit = handoffs.decode(prompt)
        self.label = self._unit.index if self._unit is not None else -1
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def send(self, rid: str, sampling: SamplingParams) -> None:
        """Starts a request."""
        self._handoffs.num_open += 1
        self._tasks[rid] = asyncio.create_task(self._serve(Job(rid, list(self._prompt), sampling)))

    def abort(self, rid: str) -> None:
        """Ends a request on both sides, unless it has ended."""
        self._tasks[rid].cancel()

    def close(self) -> None:
        """Ends those that have not ended."""
        for task in self._tasks.values():
            task.cancel()

    # --- one request ------------------------------------------------------------------------------

    async def _serve(self, job: Job) -> None:
        avoid: list[Unit] = []
        try:
            for left in range(self._handoffs.migration_limit, -1, -1):
                try:
                    await self._attempt(job, avoid)
                    return
                except Lost as error:
                    log.warning("request %s: %s; %d more tries", job.rid, error, left)
                    reason = str(error)
            self._fail(job, f"{reason} (tried {self._handoffs.migration_limit + 1} times: deploy.migration_limit)")
        except Refused as error:
            self._fail(job, str(error))
        except Exception as error:
            log.exception("request %s failed", job.rid)
            self._fail(job, f"internal error: {type(error).__name__}")
        finally:
            self._handoffs.num_open -= 1

    def _fail(self, job: Job, reason: str) -> None:
        self._sink.put(Output(job.rid, [], "error", error=reason))

    async def _attempt(self, job: Job, avoid: list[Unit]) -> None:
        """Serves the request, or what is left of it, once. ``avoid`` grows by the workers that it was lost on."""
        decode = self._unit if self._unit is not None and not self._unit.client.down and not avoid else None
        decode = decode or self._handoffs.decode(job.tokens, avoid)
        if decode is None:
            raise Refused("no decode worker lives")
        prefill = self._handoffs.prefill(job.tokens, avoid)
        try:
            await Attempt(self._handoffs, job, prefill, decode, self._sink).run()
        except Lost:
            avoid += [unit for unit in (prefill, decode) if unit is not None]
            raise
