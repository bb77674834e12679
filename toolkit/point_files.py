"""``points/``: the truth about a sweep on disk, one file a load point; requests.parquet and sweep.csv follow from it.

A file is named by its point's key and holds everything about it: its requests as rows and, in the parquet metadata, its
state, its row of the sweep and the settings it was measured under. It is written once, when the point has ended,
flushed to the disk and renamed, so that whatever is killed later, a point is there whole or not at all.

A key is a hash of what matters to the figures: the deployment, the load, and which point of the sweep it is; never of
paths, ports or names. A sweep that is taken up again recognises by it what it has. Uses records/ and nothing else.
Read next: ``loadgen/sweep.py``, which writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.records import RAW, REQUESTS
from toolkit.records.files import replacing
from toolkit.records.requests import requests_schema
from toolkit.records.status import PointStatus

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FOLDER = "points"
SUPERSEDED = "superseded"  # inside it: earlier tries at points that were run again
META = b"point"
SUFFIX, RAW_SUFFIX = ".parquet", ".raw.parquet"


@dataclass(frozen=True)
class StoredPoint:
    """What a file says of its point.

    Attributes:
        row: its row of sweep.csv; None for a point that was cut off, whose figures would be those of another load.
        settings: what its key is the hash of.
    """

    path: Path
    status: PointStatus
    row: dict[str, Any] | None
    settings: dict[str, Any]


def key_of(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of ``settings`` as canonical JSON."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_digest(path: str) -> str:
    """What a file says, without where it lies: SHA-256 of its content; empty for no path."""
    if not path:
        return ""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_point(
    folder: Path,
    status: PointStatus,
    row: dict[str, Any] | None,
    settings: Mapping[str, Any],
    table: pa.Table,
    raw: pa.Table | None = None,
) -> None:
    """Files a point that has ended. An earlier try at it is put aside, not lost."""
    assert status.key, "a point without a key"
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    _supersede(place, status.key)
    meta = {"status": asdict(status), "row": row and {k: _plain(v) for k, v in row.items()}, "settings": settings}
    schema = table.schema.with_metadata({**(table.schema.metadata or {}), META: json.dumps(meta).encode()})
    if raw is not None:
        _write(place / f"{status.key}{RAW_SUFFIX}", raw)
    _write(place / f"{status.key}{SUFFIX}", table.replace_schema_metadata(schema.metadata))


def read_points(folder: Path) -> list[StoredPoint]:
    """Every point that has a file, in the order in which they ended; reads no rows.

    Raises:
        ValueError: a file is not one that ``write_point`` left.
    """
    import pyarrow.parquet as pq

    found = []
    for path in _files(folder):
        try:
            meta = json.loads((pq.read_schema(path).metadata or {})[META])
            status = msgspec.convert(meta["status"], PointStatus)
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a load point of this toolkit: {error}") from None
        row = meta["row"] and {name: math.nan if value is None else value for name, value in meta["row"].items()}
        found.append(StoredPoint(path, status, row, meta["settings"]))
    return sorted(found, key=lambda point: point.status.ended)


def read_rows(point: StoredPoint) -> pd.DataFrame:
    import pyarrow.parquet as pq

    frame: pd.DataFrame = pq.read_table(point.path).to_pandas()
    return frame


def join(folder: Path, keys: Sequence[str]) -> None:
    """Writes requests.parquet (and raw.parquet): the rows of every point, ``point`` being its place in ``keys``.

    One batch at a time: memory does not grow with the run. Points without a file have no rows.
    """
    _join(folder, keys, REQUESTS, SUFFIX, requests_schema())
    from toolkit.records.requests import raw_schema

    _join(folder, keys, RAW, RAW_SUFFIX, raw_schema())


def newer_than_joined(folder: Path) -> bool:
    """Whether ``points/`` has what requests.parquet lacks: the run goes on, or was killed before it could end."""
    files = _files(folder)
    joined = folder / REQUESTS
    return bool(files) and (not joined.exists() or max(f.stat().st_mtime_ns for f in files) > joined.stat().st_mtime_ns)


def rejoin(folder: Path, order: Iterable[str]) -> None:
    """``join`` for a folder that was left in the middle; ``order``: keys as status.json has them."""
    stored = [point.status.key for point in read_points(folder)]
    known = [key for key in order if key]
    join(folder, [*known, *(key for key in stored if key not in known)])


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / FOLDER).glob(f"*{SUFFIX}") if not path.name.endswith(RAW_SUFFIX)]


def _supersede(place: Path, key: str) -> None:
    for suffix in (SUFFIX, RAW_SUFFIX):
        old = place / f"{key}{suffix}"
        if not old.exists():
            continue
        (place / SUPERSEDED).mkdir(exist_ok=True)
        tries = len(list((place / SUPERSEDED).glob(f"{key}-*{suffix}")))
        old.rename(place / SUPERSEDED / f"{key}-{tries}{suffix}")


def _write(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with replacing(path, "wb") as out:
        pq.write_table(table, out, compression="zstd")
        out.flush()
        os.fsync(out.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def _join(folder: Path, keys: Sequence[str], name: str, suffix: str, schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [(place, path) for place, key in enumerate(keys) if (path := folder / FOLDER / f"{key}{suffix}").exists()]
    if not parts:
        return
    with replacing(folder / name, "wb") as out, pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for place, path in parts:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
                    if "point" in schema.names:
                        at, number = schema.get_field_index("point"), pa.array([place] * len(table), pa.int64())
                        table = table.set_column(at, "point", number)
                    writer.write_table(table.cast(schema))


def _plain(value: Any) -> Any:
    """A figure as JSON can hold it: numpy's numbers as Python's, NaN as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value
