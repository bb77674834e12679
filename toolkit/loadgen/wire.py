"""What the parent and a worker process say to each other: a line of JSON each, commands one way and reports the other.

Read next: ``worker.py`` (the process), ``pool.py`` (its parent).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from toolkit.loadgen.proof import Evidence

RAW_SUFFIX = ".raw"  # of the file beside the rows, where bytes are kept


class Point(msgspec.Struct, tag="point", frozen=True):
    """This process's share of a load point; ``calls`` and ``bodies`` are files.

    Attributes:
        slots: closed loop: its slots; open loop: most conversations open at a time, 0: any number.
        offset, stride: its place among all processes' slots.
        open_loop: calls are sent at their ``at_s``.
    """

    index: int
    concurrency: int
    slots: int
    open_loop: bool
    calls: str
    bodies: str
    rows: str
    offset: int = 0
    stride: int = 1
    ramp_s: float = 0.0


class Go(msgspec.Struct, tag="go", frozen=True):
    """All processes are ready: begin."""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Give up what is in flight, and write down what there is."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    pass


class Progress(msgspec.Struct, tag="progress", frozen=True):
    done: int
    failed: int
    cancelled: int
    reads: int
    parsing: bool = False


class Done(msgspec.Struct, tag="done", frozen=True):
    evidence: Evidence
    interrupted: bool


class Broken(msgspec.Struct, tag="broken", frozen=True):
    """The process itself failed."""

    reason: str


class Setup(msgspec.Struct, frozen=True):
    """What holds for all points of a run."""

    url: str
    transport: Literal["socket", "aiohttp"]
    timeout_s: float
    api_key_env: str = ""
    headers: dict[str, str] = {}
    record_text: bool = True
    record_raw: bool = False
    cpu: int = -1  # core to stay on; -1: any


Command = Point | Go | Stop
Report = Ready | Progress | Done | Broken
