"""Options of expert placement, balancing and counting that cannot be: refused by field, value, rule and way out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.launch_experiment import experiment
from toolkit.launch.check_model import check_model

DEP4 = {"tp_size": 4, "dp_size": 4, "ep_size": 4, "enable_dp_attention": True}
TP1 = {"tp_size": 1, "dp_size": 1, "ep_size": 1, "enable_dp_attention": False}


def errors(**engine: Any) -> list[str]:
    cluster = engine.pop("cluster", {})
    cfg = experiment(parallel=engine.pop("parallel", DEP4), engine=engine, cluster=cluster)
    return check_model(cfg)


def test_a_sound_choice_is_taken() -> None:
    assert errors(enable_eplb=True, ep_num_redundant_experts=4, eplb_rebalance_layers_per_chunk=2) == []


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"enable_eplb": True, "parallel": TP1},
            "ep_size=1: use ep_size > 1",
        ),
        ({"enable_eplb": True, "expert_distribution_recorder_mode": None}, "recorder_mode=null: use stat"),
        (
            {"expert_distribution_recorder_mode": "per_token", "enable_two_batch_overlap": True},
            "per_token cannot tell the halves",
        ),
        ({"eplb_min_rebalancing_utilization_threshold": 1.5}, "threshold=1.5 must be above 0 and at most 1"),
        ({"eplb_transfer_budget": 0.0}, "eplb_transfer_budget=0.0 is a share of the slots"),
        ({"eplb_rebalance_num_iterations": 0}, "eplb_rebalance_num_iterations=0 must be at least 1"),
        ({"eplb_rebalance_layers_per_chunk": 0}, "eplb_rebalance_layers_per_chunk=0 must be at least 1"),
        ({"eplb_algorithm": "spill"}, "eplb_algorithm=spill keeps groups of experts together"),
        ({"init_expert_location": "nowhere.pt"}, "engine.init_expert_location=nowhere.pt is not a file"),
        (
            {"init_expert_location": json.dumps({"physical_to_logical_map": [[0, 0, 0, 0]]})},
            "engine.init_expert_location",
        ),
    ],
)
def test_a_wrong_choice_is_refused(engine: dict[str, Any], message: str) -> None:
    found = errors(**engine)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"expert_distribution_recorder_mode": "per_token"}, "sees no token inside a CUDA graph"),
    ],
)
def test_what_gpus_cannot_do_is_refused_there(engine: dict[str, Any], message: str) -> None:
    assert errors(**engine) == []
    found = errors(**engine, cluster={"device": "cuda"})
    assert any(message in error for error in found), found
