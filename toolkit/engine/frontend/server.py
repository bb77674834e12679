"""The frontend process: the workers behind it, HTTP in front of it, and its life from start to SIGTERM.

/live and /health answer from the first moment; completions once every rank is ready and the tokenizer is loaded. With
``api_servers`` > 1 completions are answered by as many processes, and this one does the rest for them.
Read next: ``completions.py``, ``operations.py``, ``api_servers.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from toolkit.engine.args import FrontendArgs
from toolkit.engine.frontend.api_servers import ApiServers, Spawn, spawn
from toolkit.engine.frontend.completions import Completions
from toolkit.engine.frontend.fleet import Fleet
from toolkit.engine.frontend.flight import State
from toolkit.engine.frontend.http_server import HttpServer
from toolkit.engine.frontend.metrics import Metrics, RankCollector
from toolkit.engine.frontend.operations import Operations

log = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 60.0


class Server:
    """One frontend. ``await start()``, then ``await stop()``. Made inside a running event loop.

    Args:
        token: the run's secret, for the wire to the ranks.
        api_key: what clients must send as Bearer; empty: nothing.
        spawn: makes API servers.

    Attributes:
        broken: why it cannot go on, once it cannot.
    """

    broken: asyncio.Future[str]

    def __init__(
        self, args: FrontendArgs, token: str, api_key: str = "", control_timeout_s: float = CONTROL_TIMEOUT_S,
        spawn: Spawn = spawn,
    ) -> None:  # fmt: skip
        self._args = args
        fleet = self._fleet = Fleet(args, token)
        self._metrics = Metrics(RankCollector(lambda: fleet.stats, lambda: fleet.num_open))
        self.broken = asyncio.get_running_loop().create_future()
        self._completions = Completions(args, fleet, self._metrics)
        several = args.api_servers > 1
        self._api_servers = ApiServers(args, fleet, api_key, self._break, spawn) if several else None
        operations = Operations(args, fleet, lambda: self.state, self._waits_for, self._render, control_timeout_s)
        routes = operations.routes() + ([] if self._api_servers else self._completions.routes())
        self._http = HttpServer(routes, api_key, self._metrics)

    async def start(self) -> None:
        """Serves from here on. ``ValueError`` when the address cannot be bound."""
        host, port = self._args.http
        try:
            if self._api_servers is None:
                await self._http.listen(host, port)
                self._completions.load()
            else:
                await self._api_servers.start(self._http)
        except ValueError:
            await self.stop()
            raise
        log.info("serving on http://%s:%d", host, port)

    async def stop(self) -> None:
        """Ends open requests with an error, tells their ranks, and closes everything."""
        await self._fleet.fail("the server is shutting down")
        if self._api_servers is not None:
            await self._api_servers.end()
        await self._http.close()
        await self._fleet.close()

    @property
    def state(self) -> State:
        if self._api_servers is None:
            return self._completions.state
        state = self._fleet.state
        return "loading" if state == "ready" and not self._api_servers.ready else state

    def _break(self, reason: str) -> None:
        if not self.broken.done():
            log.error("%s", reason)
            self.broken.set_result(reason)

    def _waits_for(self) -> dict[str, Any]:
        if self._api_servers is None:
            return {"tokenizer": "ready" if self._completions.loaded else "loading"}
        return {"api_servers": f"{self._api_servers.num_ready} of {self._args.api_servers} are ready"}

    async def _render(self) -> bytes:
        return self._metrics.render(await self._api_servers.samples() if self._api_servers is not None else [])


def api_key(args: FrontendArgs) -> str:
    """The key named by ``api_key_env``. ``ValueError`` when the variable is named and not set."""
    key = os.environ.get(args.api_key_env, "") if args.api_key_env else ""
    if args.api_key_env and not key:
        raise ValueError(f"deploy.api_key_env={args.api_key_env} is not set: export it, or leave api_key_env empty")
    return key
