"""An API server: a process that answers completions over HTTP, and passes all else on to its frontend.

Several share one port: the kernel gives each its part of the connections. It ends with its frontend.
Read next: ``relay.py``, ``completions.py``.
"""

from __future__ import annotations

import logging
import socket

import aiohttp
from aiohttp import web
from yarl import URL

from toolkit.engine.frontend.completions import Completions
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.http_server import HttpServer
from toolkit.engine.frontend.metrics import Metrics
from toolkit.engine.frontend.operations import PATHS
from toolkit.engine.frontend.relay import Begin, Link, Listening, Ready, RelayedFleet

log = logging.getLogger(__name__)

_PASSED_ON = ("Authorization", "Content-Type")
_PASSED_BACK = ("Content-Type", "Retry-After", "x-request-id")


async def serve(end: socket.socket) -> None:
    """Until the frontend at the other end is gone."""
    link = await Link.of(end)
    begin = await link.to_server()
    assert isinstance(begin, Begin), begin
    await _ApiServer(begin, link).run()


class _ApiServer:
    def __init__(self, begin: Begin, link: Link) -> None:
        self._begin, self._link, self._told = begin, link, False
        metrics = Metrics()
        self._fleet = RelayedFleet(link, self._tell, metrics.samples)
        self._completions = Completions(begin.args, self._fleet, metrics, begin.index, begin.num, self._tell)
        forwarded = [web.route(method, path, self._forward) for method, path in PATHS]
        routes = [*self._completions.routes(), *forwarded]
        self._http = HttpServer(routes, begin.api_key, metrics, {path for _, path in PATHS})

    async def run(self) -> None:
        connector = aiohttp.UnixConnector(self._begin.operations)
        timeout = aiohttp.ClientTimeout(total=None)  # an operation's is the frontend's
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._frontend:
            try:
                await self._http.listen(*self._begin.args.http, shared=True)
                self._link.send(Listening())
                self._completions.load()
                await self._fleet.run()
            finally:
                await self._http.close()
                await self._fleet.close()

    def _tell(self) -> None:
        """Once, when completions are served."""
        if self._completions.state == "ready" and not self._told:
            self._told = True
            self._link.send(Ready())

    async def _forward(self, http: web.Request) -> web.Response:
        url = URL(f"http://frontend{http.rel_url.raw_path_qs}", encoded=True)
        headers = {name: http.headers[name] for name in _PASSED_ON if name in http.headers}
        try:
            async with self._frontend.request(http.method, url, data=await http.read(), headers=headers) as answer:
                passed = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
                return web.Response(body=await answer.read(), status=answer.status, headers=passed)
        except aiohttp.ClientError as error:
            raise ApiError(503, f"the frontend does not answer: {error}", code="failed") from None
