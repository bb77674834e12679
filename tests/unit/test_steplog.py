"""The step log: rows on disk while the engine runs, bounded, and readable after a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from toolkit import records
from toolkit.engine import rowlog
from toolkit.engine.core import Batch, SamplingParams
from toolkit.engine.kv.kinds import LayerKind
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.scheduler import Scheduler
from toolkit.engine.steplog import StepLog
from toolkit.records.steps import read_steps, steps_path
from toolkit.records.streams import open_rows


def scheduler(blocks: int = 64) -> Scheduler:
    tables = BlockTables([LayerKind(0, (0,), blocks)], page_size=4, prefix_cache=False)
    return Scheduler(tables, token_budget=16, max_running=8, max_len=64)


def serve(log: StepLog, work: Scheduler) -> list[Batch]:
    """Runs the scheduler to its end, every sampled token a 1; returns the batches."""
    batches = []
    while not work.idle:
        batch = work.schedule()
        work.finish(batch, [1 for s in batch.scheduled if s.samples])
        log.add(len(batches), 100.0 + len(batches), 0.5, batch, work)
        batches.append(batch)
    return batches


def test_rows_say_what_each_step_did_and_add_up(tmp_path: Path) -> None:
    log, work = StepLog(steps_path(tmp_path, 0), 3, page_size=4), scheduler()
    for name in ("a", "b"):
        work.add(name, list(range(20)), SamplingParams(max_tokens=5))
    batches = serve(log, work)
    assert log.flush()
    steps = read_steps(tmp_path)
    assert list(steps["step"]) == list(range(len(batches)))
    assert steps["tokens"].tolist() == [batch.num_tokens for batch in batches]
    assert (steps["tokens"] == steps["decode_tokens"] + steps["prefill_tokens"]).all()
    assert steps["prefill_tokens"].sum() == 40 and steps["decode_tokens"].sum() == 2 * (5 - 1)
    assert set(steps["dp_rank"]) == {3} and (steps["kv_total_tokens"] == 256).all()
    assert steps["kv_used_tokens"].max() == 48 and steps["kv_used_tokens"].iloc[-1] == 0
    log.close()


def test_preemptions_are_counted_in_the_step_that_made_them(tmp_path: Path) -> None:
    log, work = StepLog(steps_path(tmp_path, 0), 0, page_size=4), scheduler(blocks=16)
    for name in "abcd":
        work.add(name, list(range(12)), SamplingParams(max_tokens=20))
    serve(log, work)
    log.close()
    steps = read_steps(tmp_path)
    assert steps["preemptions"].sum() == work.stats.preemptions > 0


def test_a_hanging_disk_costs_the_oldest_rows_not_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, work = threading.Event(), scheduler()
    real = open_rows

    def slow(path: Path, record: type):
        gate.wait()
        return real(path, record)

    monkeypatch.setattr(rowlog, "open_rows", slow)
    log = StepLog(steps_path(tmp_path, 0), 0, page_size=4, max_queued=10)
    for step in range(100):
        log.add(step, float(step), 0.1, Batch(), work)
    assert not log.flush(timeout_s=0.05)
    gate.set()
    assert log.flush()
    log.close()
    assert read_steps(tmp_path)["step"].tolist() == list(range(90, 100))
    assert "90 rows lost" in caplog.text


def test_what_was_flushed_survives_a_kill_and_a_cut_off_tail(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from toolkit.records.steps import steps_path\n"
        "from toolkit.engine.steplog import StepLog; from tests.unit.test_steplog import scheduler\n"
        "from toolkit.engine.core import Batch\n"
        "log = StepLog(steps_path(Path(sys.argv[1]), 1), 1, 4)\n"
        "for step in range(7):\n"
        "    log.add(step, float(step), 0.1, Batch(), scheduler()); assert log.flush()\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 9
    assert read_steps(tmp_path)["step"].tolist() == list(range(7))
    path = steps_path(tmp_path, 1)
    os.truncate(path, path.stat().st_size - 10)
    assert read_steps(tmp_path)["step"].tolist() == list(range(6))


def test_a_folder_that_cannot_be_written_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / records.STEPS).write_text("in the way")
    log = StepLog(steps_path(tmp_path, 0), 0, page_size=4)
    log.close()
    log.add(0, 0.0, 0.1, Batch(), scheduler())
    assert "is not written any more" in caplog.text


def test_ranks_are_merged_in_the_order_of_time(tmp_path: Path) -> None:
    for rank in (0, 2):
        log = StepLog(steps_path(tmp_path, rank), rank // 2, page_size=4)
        for step in range(3):
            log.add(step, 10.0 * step + rank, 0.1, Batch(), scheduler())
        log.close()
    steps = read_steps(tmp_path)
    assert steps["step"].tolist() == [0, 0, 1, 1, 2, 2] and steps["dp_rank"].tolist() == [0, 1] * 3
