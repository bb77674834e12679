"""What happens beside the requests: the server's own metrics kept with the run, and its profiler and cache hooks.

Runs in the parent process, which takes no latencies. A server without one of these loses nothing but that: it is said
once, and the sweep goes on. Knows no names of metrics: all that ``/metrics`` shows is kept as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from pathlib import Path

import aiohttp

from toolkit.loadgen.options import Options
from toolkit.records.samples import MetricSample, write_server_metrics

log = logging.getLogger(__name__)

SCRAPE_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
HOOK_TIMEOUT = aiohttp.ClientTimeout(total=120.0)  # writing a profile takes its time
SLOW_DOWN = "/slow_down?pool=decode"
FILL_SLEEP_S = 0.3  # before each decode step while its batch fills up: few tokens are given out meanwhile
FILL_STALL_S = 30.0  # no more requests join: the batch is as full as it gets
MAX_SAMPLES = 5_000_000  # some 100 MB as a file; a run of hours with a chatty server ends there, and says so


def parse_metrics(text: str, when: float, url: str) -> list[MetricSample]:
    """Prometheus text -> samples. Raises ``ValueError`` when it is not that."""
    from prometheus_client.parser import text_string_to_metric_families

    return [
        MetricSample(when, url, sample.name, json.dumps(sample.labels, sort_keys=True), float(sample.value))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not math.isnan(sample.value)
    ]


class Around:
    """``async with`` it around a run; ``before_point`` and ``after_point`` around each load point.

    Args:
        url: the server's, without a path.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, options: Options) -> None:
        self.samples: list[MetricSample] = []
        self._session = session
        self._url = url
        self._options = options
        self._missing: set[str] = set()
        self._scraping: list[asyncio.Task[None]] = []
        self._filling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Around:
        if self._options.scrape and self._options.out:
            urls = dict.fromkeys([f"{self._url}/metrics", *self._options.scrape_urls])
            self._scraping = [asyncio.create_task(self._scrape(url)) for url in urls]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._scraping:
            task.cancel()
        self._write()

    async def before_point(self, concurrency: int) -> None:
        if self._options.flush_cache:
            await self._post("/flush_cache")
        if self._options.profile:
            await self._post("/start_profile")
        if self._options.phase == "decode":
            await self._post(SLOW_DOWN, {"forward_sleep_time": FILL_SLEEP_S})
            self._filling = asyncio.create_task(self._fill(concurrency))

    async def after_point(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            await self._post(SLOW_DOWN, {"forward_sleep_time": None})
            self._filling = None
        if self._options.profile:
            await self._post("/stop_profile")
        self._write()

    def _write(self) -> None:
        if self.samples and self._options.out:
            write_server_metrics(Path(self._options.out), self.samples)

    async def _fill(self, concurrency: int) -> None:
        """Lets decode go on once it generates for all requests, or when their number has not grown for a while."""
        most, since, began = 0, time.monotonic(), time.monotonic()
        while most < concurrency and time.monotonic() - since < FILL_STALL_S:
            await asyncio.sleep(FILL_SLEEP_S)
            running = await self._generating()
            if running > most:
                most, since = running, time.monotonic()
        await self._post(SLOW_DOWN, {"forward_sleep_time": None})
        log.info("decode generates for %d of %d requests after %.1f s", most, concurrency, time.monotonic() - began)

    async def _generating(self) -> int:
        """Requests in the running batches of the workers that decode; 0 where the server does not say."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
            async with self._session.get(self._url + "/get_server_info", timeout=SCRAPE_TIMEOUT) as response:
                info = await response.json()
            decode = {rank for worker in info["workers"] if worker["pool"] != "prefill" for rank in worker["dp_ranks"]}
            return sum(rank["running"] for rank in info["dp_ranks"] if rank["dp_rank"] in decode)
        return 0

    async def _post(self, path: str, body: dict[str, float | None] | None = None) -> None:
        if path in self._missing:
            return
        try:
            async with self._session.post(self._url + path, json=body or {}, timeout=HOOK_TIMEOUT) as response:
                if response.status < 400:
                    return
                reason = f"HTTP {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
        self._missing.add(path)
        log.warning("%s%s: %s; the sweep goes on without it", self._url, path, reason)

    async def _scrape(self, url: str) -> None:
        """Takes samples until it is cancelled, or until the first answer shows that there are none."""
        first = True
        while len(self.samples) < MAX_SAMPLES:
            began = time.monotonic()
            reason = await self._scrape_once(url)
            if reason and first:
                log.info("%s is not kept: %s", url, reason)
                return
            first = False
            await asyncio.sleep(max(0.05, self._options.scrape_interval_s - (time.monotonic() - began)))
        log.warning("%s: %d samples are kept; no more from here on, scrape_interval_s is too short", url, MAX_SAMPLES)

    async def _scrape_once(self, url: str) -> str:
        """Returns why there are no samples; empty when there are. A later failure is a gap in the series."""
        with contextlib.suppress(UnicodeDecodeError):
            try:
                async with self._session.get(url, timeout=SCRAPE_TIMEOUT, headers={"Accept": "text/plain"}) as response:
                    if response.status != 200:
                        return f"HTTP {response.status}"
                    text = await response.text()
                self.samples += parse_metrics(text, time.time(), url)
                return ""
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                return str(error) or type(error).__name__
        return "no text"
