"""Expert load and what was done about it: ``experts.npz`` and ``rebalances.jsonl``.

Does not know how experts are counted or moved (``engine/eplb``), nor what imbalance is (``analysis/imbalance.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from toolkit.records import REBALANCES, SCHEMA_VERSION
from toolkit.records.files import replacing

if TYPE_CHECKING:
    import numpy as np


@dataclass
class ExpertCounts:
    """``experts.npz``: how many (token, expert) assignments the gate made, in windows of forward passes.

    Attributes:
        counts: int64 [windows, layers, experts], summed over all ranks, logical experts.
        times: float64 [windows, 2], Unix seconds of a window's begin and end.
        placement: int32 [epochs, layers, slots], logical expert of each slot; slot s is on EP rank s // (slots / ep).
        placement_times: float64 [epochs], Unix seconds from which each placement holds.
        layer_ids: int32 [layers], the model's index of each MoE layer.
        ep_size: EP ranks.
        pairs: int64 [layers, experts, experts], tokens that chose both experts, in a sample of the forward passes, all
            ranks, symmetric, zero diagonal; None where it was not counted.
        slot_counts: int64 [windows, layers, slots], rows that each slot received; None in files of older versions.
    """

    counts: np.ndarray
    times: np.ndarray
    placement: np.ndarray
    placement_times: np.ndarray
    layer_ids: np.ndarray
    ep_size: int
    pairs: np.ndarray | None = None
    slot_counts: np.ndarray | None = None


def write_experts(path: Path, experts: ExpertCounts) -> None:
    import numpy as np

    with replacing(path, "wb") as out:
        known = {name: value for name, value in vars(experts).items() if value is not None}
        np.savez_compressed(out, version=SCHEMA_VERSION, **known)


def read_experts(path: Path) -> ExpertCounts:
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        names = [name for name in ExpertCounts.__dataclass_fields__ if name != "ep_size"]
        arrays = {name: data[name] for name in names if name in data or name not in ("pairs", "slot_counts")}
        return ExpertCounts(**arrays, ep_size=int(data["ep_size"]))


class RebalanceRecord(msgspec.Struct, frozen=True):
    """One rebalance of experts, as the first rank saw it; a line of ``rebalances.jsonl``. NaN is written as null.

    ``balancedness_before`` and ``_after`` are for the counts that it was planned from, with replicas sharing their
    expert's load evenly; ``_measured`` is of the rows that slots really received in the passes looked at.
    """

    number: int
    state: Literal["done", "aborted"]  # aborted: the chunks that were committed stay
    reason: str
    trigger: str  # iterations, request
    t_asked: float  # Unix seconds: planning began; moving began; the last chunk was committed
    t_begin: float
    t_end: float
    plan_s: float
    first_step: int
    last_step: int
    passes: int  # since the look before
    assignments: int  # (token, expert) assignments that the plan rests on
    balancedness_measured: float | None
    balancedness_before: float | None
    balancedness_after: float | None
    balancedness_bound: float | None
    layers: int  # that changed
    replanned_layers: int
    waiting_layers: int  # left for the next time: the budget was used up
    moved_slots: int  # that got an expert from another rank
    local_copies: int
    same_node_sends: int
    cross_node_sends: int
    same_node_bytes: int
    cross_node_bytes: int
    chunks: int
    pauses_ms: list[float]  # what steps waited for: starting the first chunk, then each commit with the next start
    transfers_ms: list[float]  # of each chunk, beside the steps, until all ranks had said that they have it
    sent_bytes: list[int] = []  # of each chunk, by the first rank
    link_ms: list[float] = []  # that its GPU took for them (and for copies on it), beside the steps; 0 on CPUs


def append_rebalance(folder: Path, record: RebalanceRecord) -> None:
    """Adds a line; msgspec writes NaN as null."""
    with (folder / REBALANCES).open("ab") as out:
        out.write(msgspec.json.encode(record) + b"\n")


def read_rebalances(folder: Path) -> list[RebalanceRecord]:
    """All whole lines; a last one that was cut off is left out."""
    lines = (folder / REBALANCES).read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=RebalanceRecord) for line in lines]
