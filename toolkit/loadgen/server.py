"""Is the server that is being loaded still there, and still the same one? Asked only when requests fail, and between
load points, by the parent process, which takes no latencies.

A request may fail because the server refuses it, and a server may be gone; the first says something about the server,
the second makes everything that follows meaningless. Gone is a server that refuses connections, or whose ``/health``
gives a 5xx, for ``gone_s`` seconds on end, or that says itself that it has failed for good (``"state": "failed"``).
Knows HTTP only. Read next: ``sweep.py``.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
import msgspec

ASK = aiohttp.ClientTimeout(total=5.0)
AGAIN_S = 0.25
STARTED = "process_start_time_seconds"  # Prometheus' own name; every client library of a process exports it


class ServerGone(Exception):
    """The server is no longer there; the message says how that shows."""


class ServerWatch:
    """Questions to one server. ``url`` is without a path."""

    def __init__(self, session: aiohttp.ClientSession, url: str, gone_s: float) -> None:
        self._session, self._url, self._gone_s = session, url, gone_s

    async def gone(self) -> str:
        """How it shows that the server is gone; empty: it is there. Takes ``gone_s`` seconds where it is away."""
        since = time.monotonic()
        while True:
            problem, for_good = await self._problem()
            if not problem or for_good or time.monotonic() - since >= self._gone_s:
                return problem
            await asyncio.sleep(AGAIN_S)

    async def started(self) -> float | None:
        """When the server's process says it started, Unix seconds; None where it does not say."""
        try:
            async with self._session.get(f"{self._url}/metrics", timeout=ASK) as response:
                text = await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
            return None
        for line in text.splitlines():
            if line.startswith(STARTED) and len(words := line.split()) >= 2:
                return _number(words[1])
        return None

    async def _problem(self) -> tuple[str, bool]:
        """(what is wrong, whether it is for good); a server that does not answer in time is slow, not gone."""
        try:
            async with self._session.get(f"{self._url}/health", timeout=ASK) as response:
                if response.status < 500 or response.status == 501:
                    return "", False
                state, error = _state(await response.read())
                said = f": {error}" if error else ""
                return f"{self._url}/health answers {response.status}{said}", state == "failed"
        except TimeoutError:
            return "", False
        except (aiohttp.ClientError, OSError) as error:
            return f"{self._url} cannot be reached: {str(error) or type(error).__name__}", False


def _state(body: bytes) -> tuple[str, str]:
    try:
        value = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", ""
    return str(value.get("state", "")), str(value.get("error", ""))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
