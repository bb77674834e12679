"""Completions: the two completion routes from the first moment on, answered 503 until all that they need is there.

Loads the tokenizer; makes the ``Generator`` that answers when the ranks are ready. Read next: ``generate.py``.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable

from aiohttp import web

from toolkit.engine.arch import read_arch
from toolkit.engine.args import FrontendArgs
from toolkit.engine.frontend.errors import ApiError
from toolkit.engine.frontend.flight import Serving, State
from toolkit.engine.frontend.generate import Generator
from toolkit.engine.frontend.metrics import Metrics
from toolkit.engine.frontend.sampling import Limits
from toolkit.engine.frontend.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


class Completions:
    """
    Args:
        index, num: of the processes that answer beside each other.
        on_load: called when the tokenizer is loaded.
    """

    def __init__(
        self, args: FrontendArgs, fleet: Serving, metrics: Metrics, index: int = 0, num: int = 1,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._args, self._fleet, self._metrics, self._place, self._on_load = args, fleet, metrics, (index, num), on_load
        self._tokenizer: Tokenizer | None = None
        self._vocab_size = 0
        self._generator: Generator | None = None
        self._loading: asyncio.Task[None] | None = None  # kept: the event loop holds tasks weakly

    @property
    def state(self) -> State:
        state = self._fleet.state
        return "loading" if state == "ready" and self._tokenizer is None else state

    @property
    def loaded(self) -> bool:
        return self._tokenizer is not None

    def load(self) -> None:
        """Begins to load the tokenizer."""
        self._loading = asyncio.create_task(self._load())

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self._chat), web.post("/v1/completions", self._completions)]

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
        self._on_load()

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._ready().chat(http)

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._ready().completions(http)

    def _ready(self) -> Generator:
        """What serves completions, made when all that it depends on is known."""
        if self.state != "ready":
            raise not_ready(self._fleet, self.state)
        if self._generator is None:
            assert self._tokenizer is not None
            args = self._args
            self._generator = Generator(
                args.model.name, self._tokenizer, limits(self._fleet, self._vocab_size), self._fleet, self._metrics,
                args.engine.max_queued_requests, args.engine.random_seed, *self._place,
            )  # fmt: skip
        return self._generator


def not_ready(fleet: Serving, state: State) -> ApiError:
    message = fleet.failure or "the model is still loading, see /health"
    return ApiError(503, message, code=state, retry_after_s=0 if fleet.failure else 1)


def limits(fleet: Serving, vocab_size: int = 0) -> Limits:
    """A request may take the model's context, and must fit into one DP rank's KV cache."""
    context, cache = fleet.info_min("max_model_len"), fleet.info_min("max_total_tokens")
    if cache < context:
        return Limits(cache, "engine.max_total_tokens", vocab_size)
    return Limits(context, "max_model_len", vocab_size)
