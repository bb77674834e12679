"""The rows of all processes of a load point as one table. Knows Arrow files and clocks' offsets, nothing of loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def tables(paths: Sequence[Path], offsets_s: Sequence[float], when: str, scale: float) -> pa.Table | None:
    """The processes' Arrow files as one table, column ``when`` on this node's clock; None where there is none.

    Args:
        offsets_s: each process's clock minus this node's.
        scale: units of ``when`` a second.
    """
    import pyarrow as pa

    found = []
    for path, offset in zip(paths, offsets_s, strict=True):
        if path.exists():
            with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
                found.append(moved(reader.read_all(), when, offset * scale) if offset else reader.read_all())
    return pa.concat_tables(found) if found else None


def moved(table: pa.Table, when: str, by: float) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    at = table.schema.get_field_index(when)
    column, kind = table.column(at), table.schema.field(at).type
    if pa.types.is_list(kind):
        flat = pc.subtract(column.combine_chunks().flatten(), round(by))
        moved = pa.ListArray.from_arrays(column.combine_chunks().offsets, flat)
    else:
        moved = pc.subtract(column, by)
    return table.set_column(at, table.schema.field(at), moved)
