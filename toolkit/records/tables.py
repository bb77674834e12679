"""Records as Arrow tables and parquet files: a column for each field of a record class, its type from the annotation.

Does not know any record. Read next: ``streams.py``, for rows that come while they are read.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.records import SCHEMA_VERSION
from toolkit.records.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def schema_of(record: type) -> pa.Schema:
    """Column names and types of a record class; a ``Literal`` is a string."""
    import pyarrow as pa

    kinds: dict[Any, Any] = {
        int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string(),
        list[float]: pa.list_(pa.float64()), list[int]: pa.list_(pa.int32()),
    }  # fmt: skip
    hints = typing.get_type_hints(record)
    columns = [(name, kinds.get(hint, pa.string())) for name, hint in hints.items()]
    return pa.schema(columns, metadata={"schema_version": str(SCHEMA_VERSION)})


def to_table(record: type, rows: Sequence[Any]) -> pa.Table:
    """``rows``, instances of ``record``, as an Arrow table."""
    import pyarrow as pa

    schema = schema_of(record)
    return pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema)


def write_table(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with replacing(path, "wb") as out:
        pq.write_table(table, out, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A parquet file; list columns stay in Arrow's flat layout: a million rows without a million objects."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=columns)
    frame = table.to_pandas(
        types_mapper=lambda kind: pd.ArrowDtype(kind) if pa.types.is_list(kind) else None,
        split_blocks=True,
        self_destruct=True,
    )
    return typing.cast("pd.DataFrame", frame)
