"""Is the server there, ready, and does it serve the model? Asked once, before the first load point."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from toolkit.loadgen.openai_api import error_message

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=15.0)


class ServerError(Exception):
    """The server cannot be loaded; the message says why and what to do."""


@contextlib.asynccontextmanager
async def open_session(api_key: str = "") -> AsyncIterator[aiohttp.ClientSession]:
    """For questions to the server beside the requests that are measured."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(headers=headers, cookie_jar=aiohttp.DummyCookieJar(), trust_env=True) as session:
        yield session


async def find_model(session: aiohttp.ClientSession, url: str, model: str) -> str:
    """The model to ask for: ``model``, or the server's first one where that is empty.

    A server without ``/health`` or ``/v1/models`` is taken as it is; it only has to answer.

    Raises:
        ServerError: it cannot be reached, is not ready, refuses the key, or does not serve ``model``.
    """
    status, body = await _get(session, f"{url}/health")
    if status >= 500 and status != 501:
        raise ServerError(f"{url} is not ready: /health answers {status}: {error_message(body)}")
    status, body = await _get(session, f"{url}/v1/models")
    if status in (401, 403):
        raise ServerError(
            f"{url} refuses the API key ({status}: {error_message(body)}); name its variable: api_key_env="
        )
    names = _names(body) if status == 200 else []
    if model and names and model not in names:
        raise ServerError(f"model={model} is not served by {url}; it serves: {', '.join(names)}")
    if not model and not names:
        raise ServerError(f"{url}/v1/models names no model; say which one with model=NAME")
    return model or names[0]


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    try:
        async with session.get(url, timeout=PROBE_TIMEOUT, headers={"Accept": "application/json"}) as response:
            return response.status, await response.read()
    except aiohttp.ClientConnectorError as error:  # its own text tells of sockets
        cause = error.os_error
        reason = os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror or str(error)
        raise ServerError(f"{url} cannot be reached: {reason}; is the server up, and url= right?") from None
    except (aiohttp.ClientError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ServerError(f"{url} cannot be reached: {reason}; is the server up, and url= right?") from None


def _names(body: bytes) -> list[str]:
    try:
        value: Any = msgspec.json.decode(body)
        return [str(entry["id"]) for entry in value["data"]]
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        return []
