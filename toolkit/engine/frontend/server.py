"""The HTTP server: routes, API key, error format, health, and its life from start to SIGTERM.

/live and /health answer from the first moment; completions once every rank is ready and the tokenizer is loaded.
The completion endpoints themselves are in ``generate.py``; read it next.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import logging
import os
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web

from toolkit.config.mapping import to_mapping
from toolkit.engine.arch import read_arch
from toolkit.engine.args import FrontendArgs
from toolkit.engine.frontend import openapi
from toolkit.engine.frontend.control import ControlRoutes
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.fleet import Fleet, State
from toolkit.engine.frontend.generate import Generator
from toolkit.engine.frontend.metrics import Metrics
from toolkit.engine.frontend.sampling import Limits
from toolkit.engine.frontend.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20
CONTROL_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 2.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """One frontend. ``await start()``, then ``await stop()``.

    Args:
        token: the run's secret, for the wire to the ranks.
        api_key: what clients must send as Bearer; empty: nothing.
    """

    def __init__(
        self, args: FrontendArgs, token: str, api_key: str = "", control_timeout_s: float = CONTROL_TIMEOUT_S
    ) -> None:
        self._args, self._api_key, self._control_timeout_s = args, api_key.encode(), control_timeout_s
        self._fleet = Fleet(args, token)
        self._metrics = Metrics(lambda: self._fleet.stats, lambda: self._fleet.num_open)
        self._tokenizer: Tokenizer | None = None
        self._vocab_size = 0
        self._generator: Generator | None = None
        self._loading: asyncio.Task[None] | None = None  # kept: the event loop holds tasks weakly
        self._runner = web.AppRunner(
            self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
        )

    async def start(self) -> None:
        """Serves from here on. ``ValueError`` when the address cannot be bound."""
        await self._runner.setup()
        host, port = self._args.http
        try:
            await web.TCPSite(self._runner, host, port, backlog=4096).start()
        except OSError as error:
            await self.stop()
            raise ValueError(
                f"http={host}:{port} cannot be bound ({error.strerror}): choose a free port (cluster.port) or an "
                "address of this host (deploy.host)"
            ) from None
        log.info("serving on http://%s:%d", host, port)
        self._loading = asyncio.create_task(self._load())

    async def stop(self) -> None:
        """Ends open requests with an error, tells their ranks, and closes everything."""
        await self._fleet.fail("the server is shutting down")
        await self._runner.cleanup()
        await self._fleet.close()

    @property
    def state(self) -> State:
        state = self._fleet.state
        return "loading" if state == "ready" and self._tokenizer is None else state

    async def _load(self) -> None:
        try:
            self._vocab_size = read_arch(self._args.model).vocab_size
            self._tokenizer = await asyncio.to_thread(load_tokenizer, self._args.model)
        except Exception as error:
            log.exception("the tokenizer cannot be loaded")
            await self._fleet.fail(f"frontend: {error}")
            return
        gc.collect()
        gc.freeze()  # what start-up made stays: collections in service need not walk it
        log.info("tokenizer loaded")

    # --- application --------------------------------------------------------------------------------

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/live", self._live),
                web.get("/health", self._health),
                web.get("/metrics", self._render_metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                web.get("/get_server_info", self._server_info),
                web.get("/openapi.json", self._openapi),
            ]
        )
        app.add_routes(self._control_routes())
        return app

    def _control_routes(self) -> list[web.RouteDef]:
        enable_eplb = self._args.engine.enable_eplb
        return ControlRoutes(self._fleet, self._ready, self._control_timeout_s, enable_eplb).routes()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around every handler: request id, API key, errors in OpenAI's format, the count by code."""
        code = 499  # what is counted when the client goes away
        try:
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = _error_response(error)
            except web.HTTPException as error:
                response = _error_response(_from_http(request, error))
                if "Allow" in error.headers:  # of 405, as RFC 9110 demands
                    response.headers["Allow"] = error.headers["Allow"]
            except Exception as error:
                log.exception("%s %s failed", request.method, request.path)
                response = _error_response(ApiError(500, f"internal error: {type(error).__name__}"))
            code = response.status
            if not response.prepared:
                response.headers.setdefault("x-request-id", uuid.uuid4().hex)
            return response
        finally:
            resource = request.match_info.route.resource
            route = resource.canonical if resource is not None else "unknown"
            self._metrics.http.labels(route, str(code)).inc()

    def _check_key(self, http: web.Request) -> None:
        if not self._api_key or http.path in ("/live", "/health", "/metrics"):
            return
        sent = http.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(sent, b"Bearer " + self._api_key):
            raise ApiError(401, "wrong or missing API key: send `Authorization: Bearer KEY`", code="invalid_api_key")

    def _ready(self) -> Generator:
        """What serves completions, made when all that it depends on is known."""
        if self.state != "ready":
            raise ApiError(503, self._fleet.failure or "the model is still loading, see /health", code=self.state,
                           retry_after_s=0 if self._fleet.failure else 1)  # fmt: skip
        if self._generator is None:
            assert self._tokenizer is not None
            args = self._args
            self._generator = Generator(
                args.model.name, self._tokenizer, self._limits(), self._fleet, self._metrics,
                args.engine.max_queued_requests, args.engine.random_seed,
            )  # fmt: skip
        return self._generator

    def _limits(self) -> Limits:
        """A request may take the model's context, and must fit into one DP rank's KV cache."""
        context, cache = self._fleet.info_min("max_model_len"), self._fleet.info_min("max_total_tokens")
        if cache < context:
            return Limits(cache, "engine.max_total_tokens", self._vocab_size)
        return Limits(context, "max_model_len", self._vocab_size)

    # --- routes -------------------------------------------------------------------------------------

    async def _live(self, http: web.Request) -> web.Response:
        return _json({"state": "live"})

    async def _health(self, http: web.Request) -> web.Response:
        if self.state == "ready":
            return _json({"state": "ready"})
        if self.state == "failed":
            return _json({"state": "failed", "error": self._fleet.failure}, status=503)
        ranks = [{"rank": r.rank, "stage": r.stage, "done": r.done, "total": r.total} for r in self._fleet.ranks]
        tokenizer = "loading" if self._tokenizer is None else "ready"
        return _json({"state": "loading", "ranks": ranks, "tokenizer": tokenizer}, status=503)

    async def _render_metrics(self, http: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._ready().chat(http)

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._ready().completions(http)

    async def _models(self, http: web.Request) -> web.Response:
        length = self._limits().tokens if self.state == "ready" else None
        model = {"id": self._args.model.name, "object": "model", "created": 0, "owned_by": "wideep-toolkit",
                 "max_model_len": length}  # fmt: skip
        return _json({"object": "list", "data": [model]})

    async def _server_info(self, http: web.Request) -> web.Response:
        args = self._args
        return _json(
            {
                "state": self.state,
                "model": to_mapping(args.model),
                "parallel": to_mapping(args.workers[-1].parallel),
                "workers": self._fleet.describe(),
                "engine": to_mapping(args.engine),
                "router": args.router,
                "ranks": [asdict(status) for status in self._fleet.ranks],
                "dp_ranks": list(self._fleet.stats.values()),
            }
        )

    async def _openapi(self, http: web.Request) -> web.Response:
        return _json(openapi.document(self._args.model.name))


def api_key(args: FrontendArgs) -> str:
    """The key named by ``api_key_env``. ``ValueError`` when the variable is named and not set."""
    key = os.environ.get(args.api_key_env, "") if args.api_key_env else ""
    if args.api_key_env and not key:
        raise ValueError(f"deploy.api_key_env={args.api_key_env} is not set: export it, or leave api_key_env empty")
    return key


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _error_response(error: ApiError) -> web.Response:
    return web.Response(body=error.body(), status=error.status, headers=error.headers, content_type="application/json")


def _from_http(http: web.Request, error: web.HTTPException) -> ApiError:
    """aiohttp's own refusals (no such route, wrong method, body too large) in OpenAI's format."""
    messages = {
        404: f"there is no {http.path} here",
        405: f"{http.method} is not allowed on {http.path}",
        413: f"the body is larger than {MAX_BODY_BYTES} bytes",
    }
    return ApiError(error.status, messages.get(error.status, error.reason))
