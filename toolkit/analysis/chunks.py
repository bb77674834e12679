"""The chunks of many requests as flat arrays, so that a million requests cost a few vector operations.

Owns how the list columns ``chunk_s`` and ``chunk_tokens`` are taken apart; metrics.py says what is made of them.
Import-light: numpy only, because the load generator imports metrics.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Chunks:
    """The chunks that carry tokens, of all rows, one after the other: seconds after the send, tokens, row."""

    times: Floats
    tokens: NDArray[np.int64]
    owner: NDArray[np.int64]

    def first(self) -> NDArray[np.int64]:
        """Positions at which another row begins."""
        return starts(self.owner)


@dataclass(frozen=True)
class Gaps:
    """The chunks after each row's first: seconds after the send, tokens, row, and seconds for each of the tokens."""

    times: Floats
    tokens: NDArray[np.int64]
    owner: NDArray[np.int64]
    per_token: Floats


def starts(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions at which a sorted ``owner`` changes, its first included."""
    return np.flatnonzero(np.diff(owner, prepend=-1))


def check_chunks(requests: pd.DataFrame) -> None:
    """Refuses rows whose chunks do not fit together, without taking the lists apart.

    Raises:
        ValueError: a row whose ``chunk_s`` and ``chunk_tokens`` differ in length.
    """
    lengths, also = _lengths(requests["chunk_s"]), _lengths(requests["chunk_tokens"])
    if (lengths != also).any():
        rid = requests["request_id"].to_numpy()[lengths != also][0]
        raise ValueError(f"request_id={rid}: chunk_s and chunk_tokens differ in length; each chunk needs both")


def chunks_of(requests: pd.DataFrame) -> Chunks:
    """Raises: as ``check_chunks``."""
    check_chunks(requests)
    times, tokens = _flat(requests["chunk_s"], np.float64), _flat(requests["chunk_tokens"], np.int64)
    owner = np.repeat(np.arange(len(requests)), _lengths(requests["chunk_s"]))
    carries = tokens > 0
    if not carries.all():
        times, tokens, owner = times[carries], tokens[carries], owner[carries]
    return Chunks(times, tokens, owner)


def gaps_of(chunks: Chunks) -> Gaps:
    same = np.ones(len(chunks.owner), bool)
    same[chunks.first()] = False
    times, tokens, owner = chunks.times[same], chunks.tokens[same], chunks.owner[same]
    return Gaps(times, tokens, owner, (times - chunks.times[:-1][same[1:]]) / tokens)


def each_token(values: Floats, tokens: NDArray[np.int64]) -> Floats:
    """A value a chunk -> a value a token."""
    return values if (tokens == 1).all() else np.repeat(values, tokens)


# Columns that come from parquet are flat already (``records.tables.read_table``) and are not taken apart row by row.


def _parts(column: pd.Series[Any]) -> list[Any] | None:
    arrow = getattr(column.array, "__arrow_array__", None)
    return [part for part in arrow().chunks if len(part)] if arrow is not None else None


def _lengths(column: pd.Series[Any]) -> NDArray[np.int64]:
    parts = _parts(column)
    if parts is None:
        return column.map(len).to_numpy(np.int64) if len(column) else np.empty(0, np.int64)
    return _joined([np.diff(part.offsets.to_numpy()) for part in parts], np.int64)


def _flat(column: pd.Series[Any], dtype: type) -> NDArray[Any]:
    parts = _parts(column)
    if parts is None:
        return _joined([np.asarray(value, dtype) for value in column], dtype)
    return _joined([part.flatten().to_numpy(zero_copy_only=False) for part in parts], dtype)


def _joined(arrays: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays or [np.empty(0)])
    return whole.astype(dtype, copy=False)
