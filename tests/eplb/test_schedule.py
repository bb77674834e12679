"""Moves in chunks, and plans from the process beside the engine."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eplb.test_planner import skewed
from tests.eplb.test_replicas import placed
from toolkit.engine.eplb.planning import Answer, Ask, Planning, plan_update
from toolkit.engine.eplb.schedule import COPY, COPY_AFTER, SEND, make_schedule
from toolkit.engine.eplb.trigger import Topology


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([(4, 1), (4, 2), (8, 2)]), st.sampled_from([6, 9, 30]),
    st.sampled_from([None, 1, 2]),
)  # fmt: skip
def test_chunk_by_chunk_the_new_placement_comes_about(
    seed: int, shape: tuple[int, int], spare: int, most: int | None
) -> None:
    """Slots filled as the moves say, from spare copies taken before anything of the chunk is written."""
    (ranks, nodes), layers = shape, 5
    old = np.stack([placed(seed + i) for i in range(layers)])
    new = np.stack([placed(seed + 100 + i) for i in range(layers)])
    new[3] = old[3]
    schedule = make_schedule(old, new, ranks, nodes, spare, most)
    local, held = 24 // ranks, old.copy()
    assert 3 not in schedule.moves_MC[:, 0]
    for chunk in schedule.chunks:
        assert most is None or len(set(chunk[:, 0])) <= most
        used = np.zeros(ranks, int)
        before = held.copy()
        for layer, kind, expert, source, target, source_slot, slot, near in chunk.tolist():
            used[target] += kind != COPY_AFTER
            if kind == COPY_AFTER:
                assert any(
                    row[0] == layer and row[1] == SEND and row[4] == target and row[6] == source_slot for row in chunk
                )
            else:
                assert before[layer, source * local + source_slot] == expert
            assert near == (source // (ranks // nodes) == target // (ranks // nodes))
            held[layer, target * local + slot] = expert
        assert (used <= spare).all() and len(chunk)
        layers_of = set(chunk[:, 0].tolist())
        assert all((held[layer] == new[layer]).all() for layer in layers_of), "a layer changes as a whole"
    assert (held == new).all()
    assert set(schedule.moves_MC[:, 1].tolist()) <= {COPY, COPY_AFTER, SEND}


def ask(number: int = 1, **changes: object) -> Ask:
    counts = np.rint(skewed(4, 16) * 1e6).astype(np.int64)
    values: dict[str, object] = {
        "number": number, "layers": 4, "counts": counts.tobytes(),
        "phy2log": np.tile(np.arange(24) % 16, (4, 1)).astype(np.int64).tobytes(), "target": b"", "ranks": 4,
        "groups": 1, "nodes": 1, "policy": "global", "budget": 1.0, "fresh": True, "spare": 6, "layers_per_chunk": None,
    }  # fmt: skip
    return Ask(**(values | changes))  # type: ignore[arg-type]


def wait(planning: Planning) -> Answer:
    end = time.monotonic() + 120
    while (answer := planning.answer()) is None:
        assert time.monotonic() < end, "no answer"
        time.sleep(0.02)
    return answer


def test_the_process_plans_what_a_direct_call_does_and_is_started_again_when_it_dies() -> None:
    planning = Planning()
    try:
        planning.ask(ask())
        answer, expected = wait(planning), plan_update(ask())
        assert answer.error == "" and answer.phy2log == expected.phy2log and answer.moves == expected.moves
        assert answer.before < answer.after <= answer.bound + 1e-9 and answer.moved > 0
        process = planning.start()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        planning.ask(ask(2))
        assert wait(planning).number == 2
        planning.ask(ask(3, phy2log=np.zeros((4, 24), np.int64).tobytes()))
        assert "has no slot for expert" in wait(planning).error
    finally:
        planning.close()


def test_the_process_ends_when_its_starter_closes_the_pipe() -> None:
    planning = Planning()
    process = planning.start()
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_a_given_placement_is_gone_to_as_it_is() -> None:
    target = np.stack([placed(i) for i in range(4)])
    answer = plan_update(ask(target=target.tobytes(), counts=b""))
    assert (answer.placement(4) == target).all() and np.isnan(answer.before) and np.isnan(answer.bound)


def test_a_first_plan_keeps_the_policys_rule() -> None:
    answer = plan_update(ask(groups=4, nodes=2, policy="hierarchical"))
    home = np.arange(24) // 12
    for row in answer.placement(4):
        for group in range(4):
            assert len(set(home[np.isin(row, np.arange(4 * group, 4 * group + 4))].tolist())) == 1


@pytest.mark.parametrize(
    ("topology", "asked", "policy"),
    [
        (Topology(32, 4, 8), "auto", "hierarchical"), (Topology(32, 1, 8), "auto", "global"),
        (Topology(32, 4, 1), "auto", "global"), (Topology(32, 4, 8), "spill", "spill"),
    ],
)  # fmt: skip
def test_the_policy_follows_nodes_and_groups(topology: Topology, asked: str, policy: str) -> None:
    assert topology.policy(asked) == policy
