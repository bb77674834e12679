"""Waits until the frontend says that every rank is ready, showing how far each has come.

Patience is measured in progress, not in time: loading may take an hour, but a rank that reports nothing new for
``health.stall_s`` is stuck. Progress is what the frontend has heard from a rank, and what its pulse shows: a warm-up
that compiles kernels layer by layer gets on without a percentage. Knows the frontend's ``GET /health`` and nothing else
of the engine.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from toolkit.launch.watch import RunFailed, Watch

POLL_S = 0.25
MOST_BARS = 16  # above, one bar for all
PLAIN_EVERY_S = 2.0


class RankProgress(msgspec.Struct, frozen=True):
    rank: int
    stage: str = ""
    done: int = 0
    total: int = 0

    def text(self) -> str:
        """``rank 3 load 40%``"""
        return f"rank {self.rank} {self.stage}" + (f" {self.done / self.total:.0%}" if self.total else "")


class Health(msgspec.Struct, frozen=True):
    """Body of ``GET /health``."""

    state: str = ""
    ranks: list[RankProgress] = []
    error: str = ""


def wait_ready(url: str, watch: Watch, stall_s: float, bars: LoadingBars) -> None:
    """Returns when ``GET url/health`` answers 200.

    Raises:
        RunFailed: a process ended, a rank reported failure, or nothing has changed for ``stall_s`` seconds.
    """
    seen: object = None
    since = time.monotonic()
    while True:
        watch.check()
        ready, health = ask(url)
        bars.update(health.ranks)
        if ready:
            return
        if health.state == "failed":
            time.sleep(1.0)
            watch.check()  # a rank that ends after it reported has more to say in its log
            raise RunFailed(f"the engine failed to start: {health.error}")
        now = (watch.marks(), health)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_s:
            watch.dump_stacks()
            raise RunFailed(
                f"no progress in loading for {stall_s:g} s (health.stall_s): {_where(health)}; stacks are in logs/"
            )
        time.sleep(POLL_S)


def ask(url: str) -> tuple[bool, Health]:
    """(ready, health); not ready and empty while nobody answers."""
    try:
        status, body = http(f"{url}/health", timeout_s=5.0)
        return status == 200, msgspec.json.decode(body, type=Health)
    except (OSError, msgspec.DecodeError):
        return False, Health()


def http(
    url: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 30.0
) -> tuple[int, bytes]:
    """(status, body) of a GET, or of a POST of ``body`` as JSON; proxies are not asked. Raises ``OSError``."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def _where(health: Health) -> str:
    if not health.ranks:
        return "the frontend does not answer"
    return ", ".join(rank.text() for rank in health.ranks if rank.stage != "ready") or "every rank is ready"


class LoadingBars:
    """A bar for each rank in a terminal; a line now and then elsewhere. Use as a context manager."""

    def __init__(self, console: Console, num_ranks: int) -> None:
        self._console = console
        self._num_ranks = num_ranks
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._printed = ("", 0.0)

    def __enter__(self) -> LoadingBars:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                console=self._console,
            )  # fmt: skip
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, ranks: Sequence[RankProgress]) -> None:
        if not ranks:
            return
        if self._progress is None:
            self._print(ranks)
        elif self._num_ranks > MOST_BARS:
            self._set(self._progress, -1, _summary(ranks), _num_ready(ranks), self._num_ranks)
        else:
            for rank in ranks:
                self._set(
                    self._progress, rank.rank, f"rank {rank.rank} {rank.stage:<10}", rank.done, rank.total or None
                )

    def _set(self, progress: Progress, key: int, text: str, done: int, total: int | None) -> None:
        if key not in self._tasks:
            self._tasks[key] = progress.add_task(text)
        progress.update(self._tasks[key], description=text, completed=done, total=total)

    def _print(self, ranks: Sequence[RankProgress]) -> None:
        text, (last, when) = _summary(ranks), self._printed
        every_rank_ready = _num_ready(ranks) == self._num_ranks
        if text != last and (every_rank_ready or time.monotonic() - when > PLAIN_EVERY_S):
            self._console.print(text)
            self._printed = (text, time.monotonic())


def _num_ready(ranks: Sequence[RankProgress]) -> int:
    return sum(rank.stage == "ready" for rank in ranks)


def _summary(ranks: Sequence[RankProgress]) -> str:
    """``ranks ready 2/4, last: rank 3 load 40%``"""
    text = f"ranks ready {_num_ready(ranks)}/{len(ranks)}"
    with contextlib.suppress(ValueError):
        slowest = min((r for r in ranks if r.stage != "ready"), key=lambda r: r.done / (r.total or 1))
        text += f", last: {slowest.text()}"
    return text
