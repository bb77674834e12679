"""Scheduler: which tokens of which requests run in the next step, and what becomes of them after it.

Continuous batching under a token budget: every decoding request gets its token, then prefill is cut into chunks.
First come, first served; when KV blocks run out, the request that arrived last gives its blocks back and is computed
again later. A step is taken back in two parts, so that the next one can be scheduled while it runs: ``advance`` at its
launch (its tokens count as computed, what it samples is UNKNOWN), ``resolve`` when its tokens are there. Work in a step
does not grow with the number of waiting requests. Ranks of one attention TP group run the same scheduler on the same
messages and so stay equal without talking. Knows no tensors. Read next: ``runner.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from toolkit.engine.core import (
    UNKNOWN,
    Batch,
    FinishReason,
    InFlight,
    Request,
    SamplingParams,
    ScheduledRequest,
    TokenLogprobs,
)
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.messages import Output
from toolkit.engine.stats import SchedulerStats


@dataclass
class Scheduler:
    """Requests of one DP rank.

    Args:
        tables: the rank's KV blocks.
        token_budget: tokens a step (chunked_prefill_size).
        max_running: requests in the running batch.
        max_len: prompt + output of one request; the blocks must do for at least one such request.
    """

    tables: BlockTables
    token_budget: int
    max_running: int
    max_len: int
    stats: SchedulerStats = field(default_factory=SchedulerStats)

    def __post_init__(self) -> None:
        assert self.tables.can_hold(self.max_len), "the KV cache cannot hold one longest request"
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, Request] = {}  # in order of admission
        self._kept: dict[str, Request] = {}  # have blocks and do not run: their KV goes to, or comes from, another rank
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def idle(self) -> bool:
        """Nothing to compute; requests whose KV travels need no steps."""
        return not self._waiting and not self._running

    def add(
        self, rid: str, prompt: Sequence[int], sampling: SamplingParams, generated: int = 0, handoff: bool = False
    ) -> Output | None:
        """Queues a request. Returns its final output when it cannot be served.

        Args:
            generated: so many tokens at the end of ``prompt`` are output.
            handoff: with its first token it ends as ``kept``, with its blocks.
        """
        refused = self.refuse(rid, prompt)
        if refused is None:
            self._waiting[rid] = self.incoming(rid, prompt, sampling, generated, handoff)
        return refused

    def refuse(self, rid: str, prompt: Sequence[int]) -> Output | None:
        """The final output of a request that cannot be served; None when it can."""
        if not prompt or len(prompt) >= self.max_len:
            error = f"prompt has {len(prompt)} tokens, which must be between 1 and {self.max_len - 1}"
            return Output(rid, [], "error", error=error)
        if any(rid in known for known in (self._waiting, self._running, self._kept)):
            return Output(rid, [], "error", error=f"request id {rid} is in use")
        return None

    def abort(self, rid: str) -> None:
        """Drops a request wherever it is; an unknown id is ignored. Not to be called between schedule and advance."""
        for held in (self._running, self._kept):
            if rid in held:
                self.tables.release(held.pop(rid))
        self._waiting.pop(rid, None)

    # --- requests whose KV travels (disagg/) --------------------------------------------------------

    def find(self, rid: str) -> Request | None:
        """A request that has blocks."""
        return self._running.get(rid) or self._kept.get(rid)

    def place(self, request: Request) -> bool:
        """Gives a request of another rank a place in the batch to be, and blocks for its KV; False: none is free."""
        beside = len(self._running) + len(self._kept)
        if beside >= self.max_running or not self.tables.place(request, reserve=beside):
            return False
        self._kept[request.rid] = request
        return True

    def join(self, rid: str, token: int) -> FinishReason | None:
        """The KV of a placed request is there: it runs from the next step on, with ``token`` as its next."""
        request = self._kept.pop(rid)
        request.tokens.append(token)
        reason = self._finish_reason(request, len(request.tokens) - 1)
        if reason is None:
            self._running[rid] = request
        else:
            self.tables.release(request)
        return reason

    def incoming(
        self, rid: str, prompt: Sequence[int], sampling: SamplingParams, generated: int, handoff: bool = False
    ) -> Request:
        """The next request in the order of arrival, to be queued (``add``) or to ``place``."""
        self._arrivals += 1
        return Request(rid, list(prompt), len(prompt) - generated, sampling, self._arrivals, handoff)

    def flush_cache(self) -> None:
        """Forgets all cached prefixes."""
        self.tables.clear_cache()

    # --- one step ---------------------------------------------------------------------------------

    def schedule(self, hold: bool = False) -> Batch:
        """The next step's batch; empty when there is nothing to do. Every batch must be given to ``advance``.

        ``hold``: admit nobody; running requests go on.
        """
        decode = self._schedule_decode()
        budget = self.token_budget - len(decode)
        prefill: list[ScheduledRequest] = []
        complete = True  # nobody is admitted while a running prompt waits for budget or blocks
        for request in self._running.values():
            if request.prefilling:
                budget -= self._schedule_chunk(request, budget, prefill)
                complete &= bool(prefill) and prefill[-1].request is request and prefill[-1].samples
        while not hold and complete and budget and self._waiting and len(self._running) < self.max_running:
            request = next(iter(self._waiting.values()))
            if not self._admit(request):
                break
            budget -= self._schedule_chunk(request, budget, prefill)
        return Batch(tuple(decode), tuple(prefill))

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step can be scheduled before the tokens of the one that runs are known.

        Not when a request might have to give way (it would be computed again from tokens that are not known), nor
        when what is sampled depends on earlier tokens by more than the model, or is reported with logprobs.
        """
        if self.tables.num_spare < len(self._running):
            return False
        return not any(request.sampling.needs_tokens for request in self._running.values())

    def advance(self, batch: Batch) -> InFlight:
        """The step of ``batch`` was launched: its tokens count as computed; what it samples comes to ``resolve``."""
        sampling: list[tuple[Request, int]] = []
        for scheduled in batch.scheduled:
            request, samples = scheduled.request, scheduled.samples
            request.num_computed += scheduled.num_tokens
            if samples:
                sampling.append((request, len(request.tokens)))
                request.tokens.append(UNKNOWN)
        return InFlight(batch, tuple(sampling), tuple(s.request.num_computed for s in batch.scheduled))

    def resolve(
        self, step: InFlight, sampled: Sequence[int], logprobs: Mapping[str, TokenLogprobs] | None = None
    ) -> list[Output]:
        """Takes the step's result: one token for each request that samples, in batch order. Oldest step first.

        A request that has ended meanwhile is passed over: the step was launched before its end was known.

        ``logprobs``: those of the tokens, by request id, where they were asked for.
        """
        outputs: list[Output] = []
        for (request, index), token in zip(step.sampling, sampled):
            if self._running.get(request.rid) is not request:
                continue
            request.tokens[index] = token
            self.stats.generated_tokens += 1
            reason = self._finish_reason(request, index)
            if reason is not None:
                del request.tokens[index + 1 :]
                self.tables.computed(request, known=index)
                self.tables.release(self._running.pop(request.rid))
            elif request.handoff:
                self.tables.computed(request, known=index)
                self._kept[request.rid] = self._running.pop(request.rid)
            entry = logprobs.get(request.rid) if logprobs else None
            of_prompt = request.prompt_logprobs if index == request.prompt_len else []
            outputs.append(
                Output(
                    request.rid, [token], reason, request.num_cached,
                    logprobs=[] if entry is None else [entry], prompt_logprobs=of_prompt,
                )
            )  # fmt: skip
        for scheduled in step.batch.scheduled:
            request = scheduled.request
            if self._running.get(request.rid) is request:
                self.tables.computed(request, known=len(request.tokens) - (request.tokens[-1] == UNKNOWN))
        return outputs

    def finish(
        self, batch: Batch, sampled: Sequence[int], logprobs: Mapping[str, TokenLogprobs] | None = None
    ) -> list[Output]:
        """``advance`` and ``resolve`` in one, for a step whose result is there at once."""
        return self.resolve(self.advance(batch), sampled, logprobs)

    # --- inside -----------------------------------------------------------------------------------

    def _schedule_decode(self) -> list[ScheduledRequest]:
        decode: dict[str, ScheduledRequest] = {}
        for request in sorted((r for r in self._running.values() if self._decodes(r)), key=lambda r: r.arrival):
            if request.rid not in self._running:
                continue  # was preempted for an earlier one
            while not self.tables.grow(request, request.num_computed + 1):
                victim = max(self._running.values(), key=lambda r: r.arrival)
                self._preempt(victim)
                decode.pop(victim.rid, None)
                if victim is request:
                    break
            else:
                decode[request.rid] = ScheduledRequest(request, 1)
        return list(decode.values())

    def _schedule_chunk(self, request: Request, budget: int, prefill: list[ScheduledRequest]) -> int:
        """Schedules as many of the request's missing tokens as budget and blocks allow; returns how many."""
        wanted = min(budget, len(request.tokens) - request.num_computed)
        room = self.tables.room(request)
        count = min(wanted, room)
        if count > 0:
            grown = self.tables.grow(request, request.num_computed + count)
            assert grown, f"{request.rid}: {count} tokens did not fit into the room of {room}"
            prefill.append(ScheduledRequest(request, count))
        return max(count, 0)

    def _admit(self, request: Request) -> bool:
        """Moves the first waiting request to the running ones, if its whole prompt fits beside them.

        A block for each running request stays free, so that it is not preempted in the very next steps.
        """
        # For logprobs of the prompt each of its tokens must be computed, once.
        scored = request.sampling.prompt_logprobs is not None and not request.num_output
        if not self.tables.admit(request, self.token_budget, reserve=len(self._running), reuse=not scored):
            return False
        if request.preemptions == 0:
            request.num_cached = request.num_computed
            self.stats.prompt_tokens += request.prompt_len
            self.stats.cached_tokens += request.num_cached
        del self._waiting[request.rid]
        self._running[request.rid] = request
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue; its tokens, output included, are computed again later."""
        del self._running[request.rid]
        self.tables.release(request)
        request.preemptions += 1
        self.stats.preemptions += 1
        self._waiting[request.rid] = request
        self._waiting.move_to_end(request.rid, last=False)

    def _decodes(self, request: Request) -> bool:
        """Whether the request's next token is to be sampled; not when the one under way will be its last."""
        last = len(request.tokens) - 1
        ends = request.handoff or self._is_long(request, last)
        return not request.prefilling and not (request.tokens[last] == UNKNOWN and ends)

    def _is_long(self, request: Request, index: int) -> bool:
        """True when the token at ``index`` is the last one for its length."""
        if index + 1 - request.prompt_len >= request.sampling.max_tokens:
            return True
        return index + 1 >= self.max_len and not request.handoff  # of one handed on, the next rank's limit counts

    def _finish_reason(self, request: Request, index: int) -> FinishReason | None:
        """Why the request ends with its token at ``index``, if it does."""
        if request.tokens[index] in request.sampling.stop_token_ids:
            return "stop"
        return "length" if self._is_long(request, index) else None

    def audit(self) -> None:
        """Asserts that no block is leaked or shared wrongly. For tests."""
        self.tables.audit([*self._running.values(), *self._kept.values()])
        assert not any(r.blocks for r in self._waiting.values()), "a waiting request holds blocks"
