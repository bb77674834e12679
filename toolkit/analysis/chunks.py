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


@dataclass(frozen=True)
class Gaps:
    """The chunks after each row's first: seconds after the send, tokens, row, and seconds for each of the tokens."""

    times: Floats
    tokens: NDArray[np.int64]
    owner: NDArray[np.int64]
    per_token: Floats


def chunks_of(requests: pd.DataFrame) -> Chunks:
    times, lengths = _flat(requests["chunk_s"], np.float64)
    tokens, also = _flat(requests["chunk_tokens"], np.int64)
    if (lengths != also).any():
        rid = requests["request_id"].to_numpy()[lengths != also][0]
        raise ValueError(f"request_id={rid}: chunk_s and chunk_tokens differ in length; each chunk needs both")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    carries = tokens > 0
    return Chunks(times[carries], tokens[carries].astype(np.int64), owner[carries])


def gaps_of(chunks: Chunks) -> Gaps:
    same = chunks.owner[1:] == chunks.owner[:-1]
    tokens = chunks.tokens[1:][same]
    return Gaps(chunks.times[1:][same], tokens, chunks.owner[1:][same], np.diff(chunks.times)[same] / tokens)


def _flat(column: pd.Series[Any], dtype: type) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A column of lists -> all its values, and the length of each list.

    Columns that come from parquet are flat already (``records.read_table``) and are not taken apart row by row.
    """
    if hasattr(column.array, "__arrow_array__"):
        parts = [chunk for chunk in column.array.__arrow_array__().chunks if len(chunk)]
        lengths = [np.diff(part.offsets.to_numpy()) for part in parts]
        values = [part.flatten().to_numpy(zero_copy_only=False) for part in parts]
    else:
        lengths = [column.map(len).to_numpy(np.int64)] if len(column) else []
        values = [np.asarray(value, dtype) for value in column]
    flat = np.concatenate(values) if values else np.empty(0)
    return flat.astype(dtype, copy=False), np.concatenate(lengths or [np.empty(0)]).astype(np.int64)
