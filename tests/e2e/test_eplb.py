"""Experts migrate under load on real ranks: by themselves and when told to; the text stays, the figures are seen."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from tests.e2e.serving import Served, serve
from tests.e2e.test_options import texts
from tests.e2e.test_server import complete, gauge, post, wait_for
from toolkit import records
from toolkit.engine.arch import read_arch
from toolkit.records.experts import read_experts, read_rebalances

PARALLEL = {"tp_size": 4, "dp_size": 2, "ep_size": 4, "enable_dp_attention": True}
ENGINE = {"max_total_tokens": 512, "max_running_requests": 8, "chunked_prefill_size": 48, "ep_num_redundant_experts": 4}
EPLB = {"enable_eplb": True, "eplb_rebalance_num_iterations": 24, "expert_distribution_recorder_window": 4}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The text without EPLB, and that a server without it says so."""
    with serve(tmp_path_factory.mktemp("plain") / "run", parallel=PARALLEL, engine=ENGINE) as served:
        refused = post(served, "/eplb/rebalance", {})
        assert refused.status_code == 409 and "engine.enable_eplb=true" in refused.json()["error"]["message"]
        assert state(served) == {"enabled": False, "state": None}
        assert "wideep:eplb" not in requests.get(f"{served.url}/metrics", timeout=30).text
        return texts(served)


@pytest.fixture(scope="module", params=[pytest.param("all_to_all", marks=pytest.mark.slow), "allgather"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = {"moe_a2a_backend": request.param, "eplb_rebalance_layers_per_chunk": 1}
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with serve(folder, parallel=PARALLEL, engine=ENGINE | EPLB | options) as server:
        yield server


def state(served: Served) -> dict[str, Any]:
    answer = requests.get(f"{served.url}/eplb", timeout=30)
    assert answer.status_code == 200
    got: dict[str, Any] = answer.json()
    return got


def done(served: Served) -> int:
    now = state(served)["state"]
    return int(now["rebalances_total"]) if now else 0


def placement(served: Served, seed: int) -> list[list[int]]:
    arch = read_arch(served.cfg.model)
    rng, experts = np.random.default_rng(seed), np.arange(arch.num_experts)
    extra = arch.slots(served.cfg.engine) - arch.num_experts
    rows = [np.concatenate([experts, rng.choice(experts, extra)]) for _ in arch.moe_layers]
    return [rng.permutation(row).tolist() for row in rows]


def test_the_text_stays_while_experts_are_told_to_move(served: Served, plain: list[str]) -> None:
    """One random placement after the other, while requests run."""
    wait_for(lambda: state(served)["state"] is not None, "no state yet")
    with ThreadPoolExecutor(1) as pool:
        for seed in range(4):
            before = done(served)
            answers = pool.submit(texts, served)
            sent = post(served, "/eplb/rebalance", {"physical_to_logical_map": placement(served, seed)})
            assert sent.status_code in (200, 409), sent.text  # 409: one of its own accord is under way
            assert answers.result() == plain
            wait_for(lambda before=before: done(served) > before, "no rebalance has ended")  # type: ignore[misc]
    assert gauge(served, "wideep:eplb_rebalances_total") == done(served) >= 4
    assert gauge(served, "wideep:eplb_moved_slots_total") > 0 and gauge(served, "wideep:eplb_pause_seconds_total") > 0
    assert gauge(served, "wideep:eplb_same_node_bytes_total") > 0 == gauge(served, "wideep:eplb_cross_node_bytes_total")


def test_experts_move_by_themselves_when_they_are_unevenly_loaded(served: Served, plain: list[str]) -> None:
    """From a placement that is as bad as can be: the copies of one expert fill a rank."""
    arch = read_arch(served.cfg.model)
    slots = arch.slots(served.cfg.engine)
    assert texts(served) == plain
    bad = np.concatenate([np.arange(arch.num_experts), np.zeros(slots - arch.num_experts, np.int64)])

    def told() -> bool:
        rows = [bad.tolist()] * len(arch.moe_layers)
        return post(served, "/eplb/rebalance", {"physical_to_logical_map": rows}).status_code == 200

    wait_for(told, "always busy")
    wait_for(lambda: state(served)["state"]["state"] == "waiting", "still moving")
    lines = len(read_rebalances(served.run_dir))
    for _ in range(6):
        assert texts(served) == plain
    own = [line for line in read_rebalances(served.run_dir)[lines:] if line.trigger == "iterations"]
    assert own, "nothing was rebalanced"
    assert all(line.state == "done" and line.balancedness_after > line.balancedness_before for line in own)


def test_a_rebalance_when_asked_for_needs_no_traffic(served: Served) -> None:
    complete(served, "count me")
    looks = gauge(served, "wideep:eplb_skipped_total") + done(served)
    wait_for(lambda: post(served, "/eplb/rebalance", {}).status_code == 200, "always busy")
    wait_for(lambda: gauge(served, "wideep:eplb_skipped_total") + done(served) > looks, "nobody looked")
    wait_for(lambda: state(served)["state"]["state"] == "waiting", "does not come to rest")
    assert not math.isnan(gauge(served, "wideep:eplb_balancedness_measured"))


@pytest.mark.parametrize(
    ("rows", "status", "message"),
    [
        ([[0, 1]], 409, "the placement has shape [1, 2], not [2, 36]"),
        ("zero", 409, "does not hold experts"),
        ("one", 400, "expected `array"),
    ],
)
def test_a_placement_that_is_none_is_refused(served: Served, rows: Any, status: int, message: str) -> None:
    arch = read_arch(served.cfg.model)
    if rows == "zero":
        rows = [[0] * arch.slots(served.cfg.engine)] * len(arch.moe_layers)
    refused = post(served, "/eplb/rebalance", {"physical_to_logical_map": rows})
    assert refused.status_code == status and message in refused.json()["error"]["message"], refused.text


def test_the_run_folder_tells_every_rebalance(served: Served) -> None:
    assert post(served, "/dump_expert_distribution_record", {}).status_code == 200
    lines = read_rebalances(served.run_dir)
    assert len(lines) == done(served)
    assert [line.number for line in lines] == sorted(line.number for line in lines)
    experts = read_experts(served.run_dir / records.EXPERTS)
    assert len(experts.placement) == len(lines) + 1 and (np.diff(experts.placement_times) > 0).all()
    assert experts.slot_counts is not None
    assert (experts.slot_counts.sum(2) == experts.counts.sum(2)).all(), "every assignment was received by one slot"
    dumps = list((served.run_dir / "expert_dumps").glob("expert_distribution_recorder_*.pt"))
    assert len(dumps) == 1


def test_a_placement_that_does_not_fit_ends_the_start_by_name(tmp_path: Path) -> None:
    given = {"init_expert_location": '{"physical_to_logical_map": [[0]]}'}
    with (
        pytest.raises(Exception, match=r"init_expert_location.*layers|rank"),
        serve(tmp_path / "run", parallel={"tp_size": 2, "ep_size": 2}, engine=ENGINE | given),
    ):
        pass
    log = (tmp_path / "run" / records.log_name("rank", 1)).read_text()
    assert "ValueError: engine.init_expert_location" in log


def test_a_rank_killed_while_experts_move_ends_all_and_leaves_readable_files(served: Served) -> None:
    """Nothing hangs in a transfer; what the folder tells are whole placements. The last that this server does."""
    wait_for(lambda: state(served)["state"]["state"] == "waiting", "still moving")
    before = done(served)
    with ThreadPoolExecutor(4) as pool:
        for seed in range(8):
            pool.submit(requests.post, f"{served.url}/v1/completions", json={"prompt": [seed] * 9, "max_tokens": 40})
        sent = post(served, "/eplb/rebalance", {"physical_to_logical_map": placement(served, 9)})
        assert sent.status_code in (200, 409), sent.text  # 409: one of its own accord is under way
        wait_for(lambda: state(served)["state"]["state"] != "waiting" or done(served) > before, "does not begin")
        pids = [json.loads((served.run_dir / "launch" / f"rank-{r}.json").read_text())["pid"] for r in (0, 2)]
        (planning,) = psutil.Process(pids[0]).children()
        os.kill(pids[1], signal.SIGKILL)

        def ended() -> bool:
            return all(p.state == "exited" for p in served.job.poll() if p.name.startswith("rank"))

        wait_for(ended, "a rank hangs")
        wait_for(lambda: not planning.is_running(), "the planning process outlives its rank")
    experts = read_experts(served.run_dir / records.EXPERTS)
    for row in experts.placement.reshape(-1, experts.placement.shape[2]):
        assert set(row.tolist()) == set(range(experts.counts.shape[2]))
