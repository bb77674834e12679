"""Operations: the routes for those who run the server: health, metrics, what it is, and acts on the engine.

The acts themselves are in ``control.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web

from toolkit.config.mapping import to_mapping
from toolkit.engine.args import FrontendArgs
from toolkit.engine.frontend import openapi
from toolkit.engine.frontend.completions import limits, not_ready
from toolkit.engine.frontend.control import OPERATIONS, ControlRoutes
from toolkit.engine.frontend.fleet import Fleet
from toolkit.engine.frontend.flight import State

PATHS = [*(("GET", path) for path in openapi.GETS), *(("POST", path) for path in OPERATIONS)]


class Operations:
    """
    Args:
        state: of the whole server, the API servers included.
        waits_for: what /health says beside the ranks while it loads.
        render: all metrics as Prometheus reads them.
    """

    def __init__(
        self,
        args: FrontendArgs,
        fleet: Fleet,
        state: Callable[[], State],
        waits_for: Callable[[], dict[str, Any]],
        render: Callable[[], Awaitable[bytes]],
        control_timeout_s: float,
    ) -> None:
        self._args, self._fleet, self._state, self._waits_for, self._render = args, fleet, state, waits_for, render
        self._control = ControlRoutes(fleet, self._check_ready, control_timeout_s, args.engine.enable_eplb)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/live", self._live),
            web.get("/health", self._health),
            web.get("/metrics", self._metrics),
            web.get("/v1/models", self._models),
            web.get("/get_server_info", self._server_info),
            web.get("/openapi.json", self._openapi),
            *self._control.routes(),
        ]

    def _check_ready(self) -> None:
        if self._state() != "ready":
            raise not_ready(self._fleet, self._state())

    async def _live(self, http: web.Request) -> web.Response:
        return _json({"state": "live"})

    async def _health(self, http: web.Request) -> web.Response:
        if self._state() == "ready":
            return _json({"state": "ready"})
        if self._state() == "failed":
            return _json({"state": "failed", "error": self._fleet.failure}, status=503)
        ranks = [{"rank": r.rank, "stage": r.stage, "done": r.done, "total": r.total} for r in self._fleet.ranks]
        return _json({"state": "loading", "ranks": ranks, **self._waits_for()}, status=503)

    async def _metrics(self, http: web.Request) -> web.Response:
        return web.Response(
            body=await self._render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _models(self, http: web.Request) -> web.Response:
        length = limits(self._fleet).tokens if self._state() == "ready" else None
        model = {"id": self._args.model.name, "object": "model", "created": 0, "owned_by": "wideep-toolkit",
                 "max_model_len": length}  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def _server_info(self, http: web.Request) -> web.Response:
        args = self._args
        return _json(
            {
                "state": self._state(),
                "model": to_mapping(args.model),
                "parallel": to_mapping(args.workers[-1].parallel),
                "workers": self._fleet.describe(),
                "engine": to_mapping(args.engine),
                "router": args.router,
                "api_servers": args.api_servers,
                "ranks": [asdict(status) for status in self._fleet.ranks],
                "dp_ranks": list(self._fleet.stats.values()),
            }
        )

    async def _openapi(self, http: web.Request) -> web.Response:
        return _json(openapi.document(self._args.model.name))


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
