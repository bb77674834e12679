"""What several attempts at one run left, put together: a run that was resumed reads as one run.

Owns the joining; a single attempt's files are records/'s. Read next: load.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit import records
from toolkit.records.experts import ExpertCounts, read_experts
from toolkit.records.samples import NodeSample
from toolkit.records.steps import read_steps
from toolkit.records.streams import read_streams
from toolkit.records.tables import read_table


def present(folder: Path, name: str) -> list[Path]:
    """The attempts that have a part called ``name``, the first one first."""
    return [attempt for attempt in records.attempt_folders(folder) if (attempt / name).exists()]


def steps(folder: Path) -> pd.DataFrame:
    """All forward passes; ``step`` counts on from attempt to attempt, so that no two passes share a number."""
    frames, offset = [], 0
    for attempt in present(folder, records.STEPS):
        try:
            frame = read_steps(attempt)
        except FileNotFoundError:  # a folder whose ranks had not begun
            continue
        frame["step"] += offset
        offset = int(frame["step"].max()) + 1 if len(frame) else offset
        frames.append(frame)
    if not frames:
        raise FileNotFoundError(f"{folder / records.STEPS} holds no rank's file")
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def experts(folder: Path) -> ExpertCounts:
    """Windows and placements one after the other, pairs added.

    Raises:
        ValueError: the attempts counted other layers, experts or ranks.
    """
    found = [read_experts(attempt / records.EXPERTS) for attempt in present(folder, records.EXPERTS)]
    whole = found[0]
    for other in found[1:]:
        alike = whole.ep_size == other.ep_size and whole.counts.shape[1:] == other.counts.shape[1:]
        if not alike or whole.placement.shape[1:] != other.placement.shape[1:]:
            raise ValueError("the attempts at this run counted other experts, slots or ranks")
        counted = [one.pairs for one in (whole, other) if one.pairs is not None]
        rows = [one.slot_counts for one in (whole, other) if one.slot_counts is not None]
        whole = dataclasses.replace(
            whole,
            counts=np.concatenate([whole.counts, other.counts]),
            times=np.concatenate([whole.times, other.times]),
            placement=np.concatenate([whole.placement, other.placement]),
            placement_times=np.concatenate([whole.placement_times, other.placement_times]),
            pairs=np.sum(counted, axis=0) if counted else None,
            slot_counts=np.concatenate(rows) if len(rows) == 2 else None,
        )
    return whole


def nodes(folder: Path) -> pd.DataFrame:
    """Samples of every attempt; of one that was killed, what its samplers had written."""
    columns = list(NodeSample._fields)
    frames = []
    for attempt in records.attempt_folders(folder):
        if (attempt / records.NODES).exists():
            frames.append(read_table(attempt / records.NODES, columns))
        elif (rows := read_streams(attempt / records.NODE_SAMPLES, NodeSample)) is not None:
            frames.append(rows.to_pandas())
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({name: [] for name in columns})


def table(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
    """The rows of a parquet file of every attempt."""
    frames = [read_table(attempt / name, columns) for attempt in present(folder, name)]
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
