"""Part: what a worker does for disaggregated serving beside its steps; one for each ``disaggregation_mode``.

All ranks of a DP group make the same calls on the same messages and agreed bits, so their schedulers stay equal
without talking: whatever one rank learns by itself (a read has ended, a reader has let go) becomes a bit in ``agree``
first. Open transfers are numbered in the order of messages; the first ``MAX_BITS`` have a bit, later ones wait.
Knows no sockets and no collectives. Read next: ``prefill.py``, ``decode.py``, ``engine/worker.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from toolkit.engine.args import WorkerArgs
from toolkit.engine.kv.layout import CacheLayout, regions
from toolkit.engine.kv.transfer import TRANSFERS, KVTransfer
from toolkit.engine.messages import Generate, Handover, Output
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Step
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Scheduler

MAX_BITS = 62  # of one int64 in `agree`


class Cache(msgspec.Struct, frozen=True):
    """``Ready.kv``: one rank's cache as a peer must know it."""

    layout: CacheLayout
    endpoint: bytes


class Part(Protocol):
    """One rank's.

    Attributes:
        kv: what peers must be given (``Ready.kv``); empty where nobody reads from here.
    """

    kv: bytes

    @property
    def busy(self) -> bool:
        """True while a transfer goes on, so that ranks must not sleep."""
        ...

    def take(self, message: Generate | Handover) -> Output | None:
        """A request, or more about one. Returns its final output when it cannot be served."""
        ...

    def abort(self, rid: str) -> None:
        """The request is not wanted any more."""
        ...

    def poll(self) -> tuple[int, int]:
        """Moves transfers on; bits of those that have ended on this rank, and of those of them that failed."""
        ...

    def apply(self, arrived: int, lost: int) -> list[Output]:
        """Acts on the bits that the group has agreed on, between two steps. Returns what to tell the frontend."""
        ...

    def stepped(self, step: Step) -> list[Output]:
        """After a step: its outputs, with tickets. The next one may be under way."""
        ...

    def flush(self) -> None:
        """Writes down what was measured until now."""
        ...

    def close(self) -> None: ...


def bits(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


def chosen(items: Sequence[str], mask: int) -> list[str]:
    """The items whose bit is set."""
    return [item for number, item in enumerate(items[:MAX_BITS]) if mask >> number & 1]


def make_transfer(args: WorkerArgs, rank: int) -> KVTransfer | None:
    """What the rank's KV cache is read from or into; None where the worker prefills and decodes."""
    mode = args.disaggregation
    return None if mode is None else TRANSFERS[mode.backend](f"{args.name}-{rank}")


def make_part(args: WorkerArgs, rank: int, groups: Groups, runner: ModelRunner, scheduler: Scheduler) -> Part | None:
    """The part of ``rank`` by ``args.disaggregation``; None where the worker prefills and decodes."""
    mode = args.disaggregation
    if mode is None:
        return None
    assert runner.transfer is not None, "the runner's cache is not in memory that peers can read"
    dims = groups.dims
    layout = CacheLayout.of(runner.cache, runner.arch, dims.attn_tp, dims.attn_tp_rank(rank))
    endpoint = runner.transfer.register(regions(runner.cache))
    leads = groups.attn_tp.rank == 0
    if mode.mode == "prefill":
        from toolkit.engine.disagg.prefill import PrefillPart

        kv = msgspec.msgpack.encode(Cache(layout, endpoint))
        return PrefillPart(scheduler, runner.transfer, kv, leads, mode.timeout_s)
    from toolkit.engine.disagg.decode import DecodePart
    from toolkit.engine.disagg.log import TransferLog

    path = Path(mode.transfers_dir) if mode.transfers_dir and leads else None
    transfers = TransferLog.of(path, args.name, rank, dims.dp_rank(rank))
    return DecodePart(scheduler, runner.transfer, layout, groups.attn_tp.rank, mode.timeout_s, transfers, runner.fence)
