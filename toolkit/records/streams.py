"""Records as Arrow streams (``*.arrows``): rows are appended while the run goes on, and readers see whole batches.

Does not know any record. Read next: ``steps.py``, whose rows come this way.
"""

from __future__ import annotations

import contextlib
import math
import typing
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.records.files import replacing
from toolkit.records.tables import schema_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


Row = typing.TypeVar("Row", bound=tuple[Any, ...])


@contextlib.contextmanager
def open_rows(path: Path, record: type[Row]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Opens an Arrow stream of ``record``; each call of what it yields appends rows that a reader then sees.

    A file that is there already, of a process that this one is started in place of, stays beside it: see ``life``.
    """
    import pyarrow as pa

    schema = schema_of(record)
    if path.exists():
        path.rename(next(old for n in count(1) if not (old := path.with_name(f"{path.stem}.{n}.arrows")).exists()))
    with path.open("wb") as out, pa.ipc.new_stream(out, schema) as stream:

        def write(rows: Sequence[Row]) -> None:
            columns = [_column(values, field.type) for values, field in zip(zip(*rows), schema)]
            stream.write_batch(pa.record_batch(columns, schema=schema))
            out.flush()

        yield write


def life(path: Path) -> float:
    """Which process wrote a stream: ``rank-0.1.arrows`` the first, ..., and ``rank-0.arrows`` the latest."""
    number = path.stem.partition(".")[2]
    return int(number) if number else math.inf


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """``pa.array`` for the types of rows. That function imports pandas: a second of a rank's time, while it serves."""
    import pyarrow as pa

    if kind == pa.string():
        texts = [value.encode() for value in values]
        offsets = pa.py_buffer(array("i", accumulate(map(len, texts), initial=0)))
        return pa.StringArray.from_buffers(len(values), offsets, pa.py_buffer(b"".join(texts)))
    assert kind in (pa.int64(), pa.float64()), f"rows have no columns of {kind}"
    data = array("q" if kind == pa.int64() else "d", values)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(data)])


def read_rows(folder: Path, record: type) -> pd.DataFrame:
    """The rows of every Arrow stream of ``record`` in a folder; see ``read_streams``.

    Raises:
        FileNotFoundError: no rank left a file.
        ValueError: a file is not a stream of ``record``.
    """
    table = read_streams(folder, record)
    if table is None:
        raise FileNotFoundError(f"{folder} holds no rank's file")
    return typing.cast("pd.DataFrame", table.to_pandas())


def read_streams(folder: Path, record: type) -> pa.Table | None:
    """The rows of every Arrow stream of ``record`` in a folder; None where there is none.

    A file that is still written, or was cut off, gives its whole batches. Raises ``ValueError`` for other columns.
    """
    import pyarrow as pa

    files = sorted(folder.glob("*.arrows"))
    return pa.concat_tables([read_stream(path, record) for path in files]) if files else None


def read_stream(path: Path, record: type) -> pa.Table:
    """The rows of one Arrow stream; see ``read_streams``."""
    import pyarrow as pa

    schema = schema_of(record)
    batches: list[Any] = []
    with pa.memory_map(str(path)) as source:
        if source.size():
            stream = pa.ipc.open_stream(source)
            if stream.schema.names != schema.names:
                raise ValueError(f"{path.name} has columns {stream.schema.names}, not {schema.names}")
            with contextlib.suppress(StopIteration, pa.ArrowInvalid, OSError):  # the end, or where it is cut off
                while True:
                    batches.append(stream.read_next_batch())
    return pa.Table.from_batches(batches, schema=schema)


def write_stream(path: Path, table: pa.Table) -> None:
    """An Arrow stream of rows that are all there already."""
    import pyarrow as pa

    with replacing(path, "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
