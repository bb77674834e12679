"""The routes with which operators and benchmarks act on a running engine. SGLang's names where it has them.

Each sends one operation to every rank, waits for all replies and passes on what they say: 409 when the state of the
ranks does not allow it, 504 when a rank stays silent. What the operations do is in ``engine/control.py``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.fleet import Fleet
from toolkit.engine.frontend.protocol import convert, json_object
from toolkit.engine.messages import Control, ControlOp, EplbStats


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """An operation without options: an empty body, or {}."""


class SlowDown(msgspec.Struct, forbid_unknown_fields=True):
    """Seconds to sleep before each forward pass; null: none. A change ends a sleep that goes on."""

    forward_sleep_time: Annotated[float, Meta(ge=0, le=3600)] | None = None


class StartProfile(msgspec.Struct, forbid_unknown_fields=True):
    """``name`` of the folder under the run's profiles/, by default the time; ``num_steps``: ends it by itself."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    num_steps: Annotated[int, Meta(ge=1, le=2**31)] | None = None


class Dump(msgspec.Struct, forbid_unknown_fields=True):
    """``since``, Unix seconds: the dump has the windows that ended later; null: all. In the recorder's modes per_pass
    and per_token it has the passes since the dump before."""

    since: Annotated[float, Meta(ge=0)] | None = None


class Rebalance(msgspec.Struct, forbid_unknown_fields=True):
    """Rebalances experts now. ``physical_to_logical_map``: the expert of each slot of each MoE layer to go to; null:
    the placement that suits what was counted."""

    physical_to_logical_map: list[list[Annotated[int, Meta(ge=0, le=2**31)]]] | None = None


class RankReply(msgspec.Struct):
    rank: int
    detail: str


class ControlAnswer(msgspec.Struct):
    ranks: list[RankReply]
    ok: bool = True


class EplbAnswer(msgspec.Struct):
    """``enabled``: engine.enable_eplb. ``state``: as of the first rank's last report; null before it."""

    enabled: bool
    state: EplbStats | None


Body = type[Nothing | SlowDown | StartProfile | Dump | Rebalance]

# path -> operation and body
OPERATIONS: dict[str, tuple[ControlOp, Body]] = {
    "/flush_cache": ("flush_cache", Nothing),
    "/start_expert_distribution_record": ("start_experts", Nothing),
    "/stop_expert_distribution_record": ("stop_experts", Nothing),
    "/dump_expert_distribution_record": ("dump_experts", Dump),
    "/slow_down": ("slow_down", SlowDown),
    "/start_profile": ("start_profile", StartProfile),
    "/stop_profile": ("stop_profile", Nothing),
    "/eplb/rebalance": ("rebalance_experts", Rebalance),
}

B = TypeVar("B", bound=msgspec.Struct)


class ControlRoutes:
    """Args: ``check_ready`` raises ``ApiError`` while the ranks cannot act."""

    def __init__(self, fleet: Fleet, check_ready: Callable[[], object], timeout_s: float, enable_eplb: bool) -> None:
        self._fleet, self._check_ready, self._timeout_s = fleet, check_ready, timeout_s
        self._enable_eplb = enable_eplb

    def routes(self) -> list[web.RouteDef]:
        operations = [web.post(path, self._handler(op, body)) for path, (op, body) in OPERATIONS.items()]
        return [*operations, web.get("/eplb", self._eplb)]

    async def _eplb(self, http: web.Request) -> web.Response:
        stats = self._fleet.leader_stats
        answer = EplbAnswer(self._enable_eplb, stats.eplb if stats is not None else None)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    def _handler(self, op: ControlOp, body: Body) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(http: web.Request) -> web.Response:
            self._check_ready()
            pool = http.query.get("pool") if "agg" not in self._fleet.pools else None  # one pool is all there is
            if pool is not None and pool not in self._fleet.pools:
                known = ", ".join(self._fleet.pools)
                raise ApiError(400, f"pool={pool} is none of this deployment's: use one of {known}, or none for all")
            return await self._run(_control(op, await _body(http, body)), pool)

        return handle

    async def _run(self, control: Control, pool: str | None) -> web.Response:
        try:
            replies = await self._fleet.control(control, self._timeout_s, pool)
        except TimeoutError as error:
            raise ApiError(504, str(error), code="timeout") from None
        if self._fleet.failure:
            raise ApiError(500, self._fleet.failure, code="failed")
        bad = [reply for reply in replies if not reply.ok]
        if bad:
            message = f"{control.op} failed on " + "; ".join(f"rank {reply.rank}: {reply.detail}" for reply in bad)
            if all(reply.refused for reply in bad):
                raise ApiError(409, message, code="refused")
            raise ApiError(500, message, code="engine_error")
        answer = ControlAnswer([RankReply(reply.rank, reply.detail) for reply in replies])
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def _control(op: ControlOp, body: Nothing | SlowDown | StartProfile | Dump | Rebalance) -> Control:
    cid = uuid.uuid4().hex
    if isinstance(body, Rebalance):
        given = body.physical_to_logical_map is not None
        return Control(cid, op, placement=msgspec.json.encode(body).decode() if given else "")
    if isinstance(body, Dump):
        return Control(cid, op, since=body.since or 0.0)
    if isinstance(body, SlowDown):
        return Control(cid, op, sleep_s=body.forward_sleep_time or 0.0)
    if isinstance(body, StartProfile):
        return Control(cid, op, folder=body.name or time.strftime("%Y%m%d-%H%M%S"), num_steps=body.num_steps or 0)
    return Control(cid, op)


async def _body(http: web.Request, cls: type[B]) -> B:
    raw = await http.read()
    return convert(json_object(raw) if raw else {}, cls)
