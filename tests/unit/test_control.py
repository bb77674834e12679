"""A rank's control operations when they cannot be done: the reply says why, and the rank goes on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.engine.control import Controller
from toolkit.engine.kv.kinds import LayerKind
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.messages import Control, ControlReply
from toolkit.engine.scheduler import Scheduler


def controller(profile_dir: Path | str) -> Controller:
    scheduler = Scheduler(BlockTables([LayerKind(0, (0,), 4)], 4), 8, 2, 16)
    return Controller(3, scheduler, None, str(profile_dir), "cpu")


def run(made: Controller, *operations: Control) -> list[ControlReply]:
    for operation in operations:
        made.take(operation)
    assert made.num_pending == len(operations)
    return made.apply(len(operations))


def op(name: Any, **fields: Any) -> Control:
    return Control("c", name, **fields)


def test_operations_run_in_order_and_only_as_many_as_agreed() -> None:
    made = controller("")
    made.take(op("slow_down", sleep_s=2.0))
    assert made.apply(1) == [ControlReply("c", 3, ok=True)] and made.forward_sleep_s == 2.0
    made.take(op("slow_down", sleep_s=5.0))
    assert made.forward_sleep_s == 0.0, "an operation waits: it may be to stop the sleep"
    assert made.apply(0) == [] and made.num_pending == 1
    made.apply(1)
    assert made.forward_sleep_s == 5.0


@pytest.mark.parametrize("name", ["start_experts", "stop_experts", "dump_experts"])
def test_without_a_recorder_counts_are_refused(name: str) -> None:
    (reply,) = run(controller(""), op(name))
    assert not reply.ok and reply.refused and "expert_distribution_recorder_mode=stat" in reply.detail


def test_profiles_without_a_place_are_refused() -> None:
    (reply,) = run(controller(""), op("start_profile", folder="a"))
    assert not reply.ok and reply.refused and "no profile_dir" in reply.detail


def test_a_profile_that_cannot_be_made_or_written_is_an_error_and_no_end(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    made = controller(taken)
    start, stop = run(made, op("start_profile", folder="a"), op("stop_profile"))
    assert not start.ok and not start.refused and "Error" in start.detail
    assert stop.refused, "it did not begin"

    made = controller(tmp_path / "profiles")
    (start,) = run(made, op("start_profile", folder="a", num_steps=1))
    assert start.ok and start.detail == "a/rank-3.trace.json.gz"
    (tmp_path / "profiles" / "a").rmdir()
    made.end_of_pass()  # cannot write: logged, not raised
    (start,) = run(made, op("start_profile", folder="b", num_steps=2))
    assert start.ok
    for _ in range(2):
        torch.ones(2) + 1
        made.end_of_pass()
    trace = json.loads(gzip.decompress((tmp_path / "profiles" / "b" / "rank-3.trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::add" for event in trace["traceEvents"])
