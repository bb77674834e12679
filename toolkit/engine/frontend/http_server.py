"""HttpServer: routes behind an API key, errors in OpenAI's format, the count of answers, an address to listen on.

Knows nothing of what the routes do: ``completions.py`` and ``operations.py`` have them. Read next: ``server.py``.
"""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Awaitable, Callable, Container, Sequence

from aiohttp import web

from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20
SHUTDOWN_TIMEOUT_S = 2.0
BACKLOG = 4096

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """``await listen_...()``, then ``await close()``.

    Args:
        api_key: what clients must send as Bearer; empty: nothing.
        forwarded: paths that another process answers, and counts.
    """

    def __init__(
        self, routes: Sequence[web.RouteDef], api_key: str, metrics: Metrics, forwarded: Container[str] = ()
    ) -> None:
        self._api_key, self._metrics, self._forwarded = api_key.encode(), metrics, forwarded
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        app.add_routes(routes)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
        )

    async def listen(self, host: str, port: int, shared: bool = False) -> None:
        """``shared``: with other processes, of which each gets its part of the connections.

        ``ValueError``: the address cannot be bound.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, backlog=BACKLOG, reuse_port=shared or None).start()
        except OSError as error:
            raise cannot_bind(host, port, error) from None

    async def listen_here(self, path: str) -> None:
        """On a Unix socket."""
        await self._runner.setup()
        await web.UnixSite(self._runner, path, backlog=BACKLOG).start()

    async def close(self) -> None:
        await self._runner.cleanup()

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
            if route not in self._forwarded:
                self._metrics.http.labels(route, str(code)).inc()

    def _check_key(self, http: web.Request) -> None:
        if not self._api_key or http.path in ("/live", "/health", "/metrics"):
            return
        sent = http.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(sent, b"Bearer " + self._api_key):
            raise ApiError(401, "wrong or missing API key: send `Authorization: Bearer KEY`", code="invalid_api_key")


def cannot_bind(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(
        f"http={host}:{port} cannot be bound ({error.strerror}): choose a free port (cluster.port) or an "
        "address of this host (deploy.host)"
    )


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
