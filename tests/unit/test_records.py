"""Rows as Arrow streams: what a rank writes while it serves is what a reader gets."""

from __future__ import annotations

import math
import subprocess
import sys
import typing
from pathlib import Path

from toolkit.records.steps import StepRecord, TransferRecord, open_steps, read_steps, steps_path
from toolkit.records.streams import open_rows, read_rows, read_stream


def transfer(**changes: typing.Any) -> TransferRecord:
    hints = typing.get_type_hints(TransferRecord)
    plain = {name: {int: 3, float: 0.5, str: "x"}[kind] for name, kind in hints.items()}
    return TransferRecord(**plain | changes)


def test_rows_of_texts_and_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    batches = [
        [transfer(request_id="", worker="h\u00e9", bytes=2**62, wait_s=-0.0), transfer(request_id="\U0001f600 b")],
        [transfer(tokens=-1, hidden_s=1e-300)],
    ]
    path = tmp_path / "decode-0.arrows"
    with open_rows(path, TransferRecord) as write:
        for rows in batches:
            write(rows)
    found = [TransferRecord(**row) for row in read_stream(path, TransferRecord).to_pylist()]
    assert found == [row for rows in batches for row in rows]


def test_who_is_started_anew_keeps_the_rows_of_the_process_before(tmp_path: Path) -> None:
    path = tmp_path / "decode-0.arrows"
    for token in range(3):
        with open_rows(path, TransferRecord) as write:
            write([transfer(tokens=token)])
    assert read_rows(tmp_path, TransferRecord)["tokens"].sort_values().tolist() == [0, 1, 2]
    assert read_stream(path, TransferRecord)["tokens"].to_pylist() == [2], "the latest has the name"


def test_steps_count_on_where_a_worker_was_started_anew(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    for life, passes in enumerate((3, 0, 2)):
        for rank in (0, 1):
            with open_steps(steps_path(tmp_path, rank)) as write:
                for step in range(passes):
                    write([StepRecord(step, 10.0 * life + step, 0.1, rank, 1, 1, 0, 1, 0, 4, 64, 0)])
    steps = read_steps(tmp_path)
    assert steps["step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and steps["dp_rank"].tolist() == [0, 1] * 5


def test_what_did_not_happen_is_not_a_number(tmp_path: Path) -> None:
    with open_rows(tmp_path / "a.arrows", TransferRecord) as write:
        write([transfer(first_decode_s=math.nan)])
    (row,) = read_stream(tmp_path / "a.arrows", TransferRecord).to_pylist()
    assert math.isnan(row["first_decode_s"])


def test_a_rank_that_writes_rows_does_not_import_pandas(tmp_path: Path) -> None:
    """It would take a second of the interpreter's lock two seconds after the rank was ready."""
    code = (
        "import sys; from pathlib import Path; from toolkit.records.streams import open_rows\n"
        "from tests.unit.test_records import TransferRecord, transfer\n"
        "with open_rows(Path(sys.argv[1]), TransferRecord) as write: write([transfer()])\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.arrows")], check=True)
