"""A request over both sides, without ranks: what is done when no prefill worker lives, and when attempts are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest

from toolkit.engine.core import SamplingParams
from toolkit.engine.frontend.disagg import DisaggFlight, Handoffs
from toolkit.engine.frontend.flight import Mailbox
from toolkit.engine.messages import Generate, Output, Ticket

PROMPT = [1, 2, 3]
TICKET = Ticket(7, 3, [[0]], 0, 50, 0.0, 0.0)


@dataclass
class Side:
    """A worker that answers each request as it is told to: the part of ``RankClient`` that a flight talks to."""

    name: str
    reply: Callable[[Generate], list[Output]]
    down: str = ""
    got: list[Generate] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    sinks: dict[str, Any] = field(default_factory=dict)

    def start(self, sink: Any, dp_rank: int, request: Generate) -> None:
        self.got.append(request)
        self.sinks[request.rid] = sink
        for output in self.reply(request):
            sink.put(output)

    def hand_over(self, rid: str, ticket: Ticket) -> None:
        """The KV is there: it joins, and generates the rest."""
        self.sinks[rid].put(Output(rid, [], joined=True))
        self.sinks[rid].put(Output(rid, [51, 52, 53], "length"))

    def kv_of(self, dp_rank: int) -> list[bytes]:
        return [b"cache"]

    def forget(self, rid: str) -> None: ...

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)


@dataclass(frozen=True, eq=False)
class At:
    """A ``fleet.Unit``."""

    client: Any
    dp_rank: int = 0
    index: int = 0


def finishing(request: Generate) -> list[Output]:
    """All tokens at once, 50, 51, ..., unless another computes the prompt."""
    if request.receive is not None:
        return []
    left = request.sampling.max_tokens - request.generated
    return [Output(request.rid, [50 + request.generated + i for i in range(left)], "length")]


def first_token(request: Generate) -> list[Output]:
    return [Output(request.rid, [50], ticket=TICKET)]


def picker(*units: At) -> Any:
    def pick(tokens: list[int], avoid: Collection[At] = ()) -> At | None:
        living = [unit for unit in units if not unit.client.down]
        return next((unit for unit in living if unit not in avoid), living[0] if living else None)

    return pick


def serve(handoffs: Handoffs, max_tokens: int = 4) -> list[Output]:
    """The outputs of one request, to its last."""

    async def run() -> list[Output]:
        mailbox = Mailbox()
        flight = DisaggFlight(handoffs, PROMPT, mailbox)
        flight.send("r", SamplingParams(max_tokens=max_tokens))
        outputs = [await asyncio.wait_for(mailbox.next(), 5)]
        while outputs[-1].finish is None:
            outputs.append(await asyncio.wait_for(mailbox.next(), 5))
        await asyncio.sleep(0)
        flight.close()
        return outputs

    return asyncio.run(run())


def handoffs(prefill: At, decode: At, enforce: bool = False, limit: int = 2, early: bool = True) -> Handoffs:
    way = "bootstrap" if early else "synchronous"
    return Handoffs(picker(prefill), picker(decode), way, enforce, limit)  # type: ignore[arg-type]


def test_without_a_prefill_worker_decode_computes_the_prompt_and_a_warning_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prefill, decode = Side("prefill0", first_token, down="killed"), Side("decode0", finishing)
    shared = handoffs(At(prefill), At(decode))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            outputs = serve(shared)
            assert [token for output in outputs for token in output.token_ids] == [50, 51, 52, 53]
    assert [request.receive for request in decode.got] == [None] * 3 and not prefill.got
    assert [record.getMessage() for record in caplog.records].count(
        "no prefill worker lives: decode workers compute prompts (deploy.enforce_disagg=false)"
    ) == 1


def test_enforce_disagg_refuses_requests_until_a_prefill_worker_is_back() -> None:
    prefill, decode = Side("prefill0", first_token, down="killed"), Side("decode0", finishing)
    shared = handoffs(At(prefill), At(decode), enforce=True)
    (refused,) = serve(shared)
    assert refused.finish == "error" and "deploy.enforce_disagg=true" in (refused.error or "")
    assert not decode.got and shared.num_open == 0
    prefill.down = ""
    assert [token for output in serve(shared) for token in output.token_ids] == [50, 51, 52, 53]


def test_the_warning_comes_again_when_prefill_is_lost_again(caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = Side("prefill0", first_token, down="killed"), Side("decode0", finishing)
    shared = handoffs(At(prefill), At(decode))
    with caplog.at_level(logging.WARNING):
        serve(shared)
        prefill.down = ""
        serve(shared)
        prefill.down = "killed"
        serve(shared)
    assert sum("no prefill worker lives" in record.getMessage() for record in caplog.records) == 2


def test_a_request_that_is_lost_goes_on_with_what_its_client_has() -> None:
    """The second attempt's prompt ends with the tokens of the first; its length limit still counts from the prompt."""

    def dies(request: Generate) -> list[Output]:
        if request.generated:
            return finishing(request)
        return [Output(request.rid, [50, 51]), Output(request.rid, [], "error", error="its process ended", retry=True)]

    prefill, decode = Side("prefill0", first_token, down="killed"), Side("decode0", dies)
    outputs = serve(handoffs(At(prefill), At(decode)))
    assert [token for output in outputs for token in output.token_ids] == [50, 51, 52, 53]
    assert [(request.prompt, request.generated) for request in decode.got] == [(PROMPT, 0), ([*PROMPT, 50, 51], 2)]


@pytest.mark.parametrize("limit", [0, 2])
def test_the_migration_limit_ends_it_with_the_last_reason(limit: int) -> None:
    lost = lambda request: [Output(request.rid, [], "error", error="no luck", retry=True)]  # noqa: E731
    prefill, decode = Side("prefill0", first_token, down="killed"), Side("decode0", lost)
    (failed,) = serve(handoffs(At(prefill), At(decode), limit=limit))
    assert failed.error == f"decode0: no luck (tried {limit + 1} times: deploy.migration_limit)"
    assert len(decode.got) == limit + 1


def test_a_request_that_cannot_be_served_is_not_tried_again() -> None:
    refused = lambda request: [Output(request.rid, [], "error", error="too long")]  # noqa: E731
    prefill, decode = Side("prefill0", first_token, down="killed"), Side("decode0", refused)
    (failed,) = serve(handoffs(At(prefill), At(decode)))
    assert failed.error == "decode0: too long" and len(decode.got) == 1


@pytest.mark.parametrize("early", [True, False])
def test_both_sides_hear_of_a_request_in_the_order_of_the_handoff(early: bool) -> None:
    prefill = Side("prefill0", lambda request: [])
    decode = Side("decode0", lambda request: [])

    async def run() -> None:
        flight = DisaggFlight(handoffs(At(prefill), At(decode), early=early), PROMPT, Mailbox())
        flight.send("r", SamplingParams(max_tokens=4))
        await asyncio.sleep(0.01)
        assert len(decode.got) == early and len(prefill.got) == 1
        if early:
            receive, send = decode.got[0].receive, prefill.got[0].send
            assert receive is not None and send is not None and receive.room == send.room
        flight.abort("r")
        await asyncio.sleep(0.01)
        rid = prefill.got[0].rid
        assert prefill.aborted == [rid] and decode.aborted == [rid] * early
        flight.close()

    asyncio.run(run())
