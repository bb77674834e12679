"""Operators acting on real ranks while they serve: recorder, slow down, flush, profile, memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.e2e.serving import Served, serve
from tests.e2e.test_server import complete, gauge, post, wait_for, wait_idle
from toolkit.records import EXPERTS, PROFILES
from toolkit.records.experts import read_experts

RANKS = 2
PARALLEL = {"tp_size": RANKS, "dp_size": RANKS, "ep_size": RANKS, "enable_dp_attention": True}
ENGINE = {"max_total_tokens": 512, "max_running_requests": 8, "expert_distribution_recorder_window": 4}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("control") / "run", parallel=PARALLEL, engine=ENGINE) as server:
        yield server


def control(served: Served, path: str, body: dict[str, Any] | None = None, status: int = 200) -> dict[str, Any]:
    answer = post(served, path, body or {})
    assert answer.status_code == status, answer.text
    got: dict[str, Any] = answer.json()
    assert status != 200 or [reply["rank"] for reply in got["ranks"]] == list(range(RANKS))
    return got


def counted(served: Served) -> int:
    """(token, expert) assignments on disk, of all windows."""
    control(served, "/dump_expert_distribution_record")
    return int(read_experts(served.run_dir / EXPERTS).counts.sum())


def test_the_recorder_counts_between_start_and_stop_only(served: Served) -> None:
    complete(served, [1] * 10)
    before = counted(served)
    assert before > 0
    complete(served, [2] * 10)
    control(served, "/stop_expert_distribution_record")
    stopped = counted(served)
    assert stopped > before
    complete(served, [3] * 10)
    assert counted(served) == stopped
    control(served, "/start_expert_distribution_record")
    control(served, "/start_expert_distribution_record")  # it is on already
    wait_idle(served)
    tokens = complete(served, [4] * 10, max_tokens=6, ignore_eos=True)["usage"]
    per_token = 2 * served.cfg.model.hf_config["num_experts_per_tok"]  # two MoE layers
    # every token but the last one sampled goes through the model once
    assert counted(served) - stopped == (tokens["total_tokens"] - 1) * per_token


def test_slow_down_holds_every_step_until_it_is_lifted(served: Served) -> None:
    """A batch builds up although each step would sleep for minutes, and goes on at once when that ends."""
    control(served, "/slow_down", {"forward_sleep_time": 600})
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(complete, served, f"held {i}", max_tokens=4, ignore_eos=True) for i in range(6)]
        wait_for(lambda: gauge(served, "wideep:num_open_reqs") == 6, "the requests have not come")
        steps = gauge(served, "wideep:engine_steps_total")
        control(served, "/flush_cache")  # other operations go through; the step that slept runs, and no more
        assert gauge(served, "wideep:engine_steps_total") <= steps + 2 * 2
        assert not any(answer.done() for answer in answers)
        control(served, "/slow_down", {"forward_sleep_time": None})
        assert all(answer.result()["usage"]["completion_tokens"] == 4 for answer in answers)
    wait_idle(served)


def test_a_profile_is_one_trace_a_rank(served: Served) -> None:
    control(served, "/start_profile", {"name": "first"})
    refused = control(served, "/start_profile", {"name": "second"}, status=409)
    assert "a profile is running (first)" in refused["error"]["message"]
    complete(served, "profile me")
    details = [reply["detail"] for reply in control(served, "/stop_profile")["ranks"]]
    assert details == [f"first/rank-{rank}.trace.json.gz" for rank in range(RANKS)]
    check_traces(served, "first")
    assert "no profile is running" in control(served, "/stop_profile", status=409)["error"]["message"]
    refused = control(served, "/start_profile", {"name": "first"}, status=409)
    assert "profile first exists" in refused["error"]["message"]


def test_a_profile_can_end_by_itself(served: Served) -> None:
    control(served, "/start_profile", {"name": "steps", "num_steps": 3})
    complete(served, "profile me", ignore_eos=True)
    folder = served.run_dir / PROFILES / "steps"
    wait_for(lambda: len(list(folder.glob("rank-*"))) == RANKS, "the traces are not written")
    check_traces(served, "steps")
    control(served, "/stop_profile", status=409)


def check_traces(served: Served, name: str) -> None:
    folder = served.run_dir / PROFILES / name
    assert sorted(path.name for path in folder.iterdir()) == [f"rank-{rank}.trace.json.gz" for rank in range(RANKS)]
    for path in folder.iterdir():
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert "aten::linear" in names, f"{path.name} holds no forward pass"


def test_server_info_has_the_memory_of_every_rank_by_kind(served: Served) -> None:
    info = requests.get(f"{served.url}/get_server_info", timeout=30).json()
    assert [rank["rank"] for rank in info["ranks"]] == list(range(RANKS))
    for rank in info["ranks"]:
        memory = rank["info"]["memory_bytes"]
        assert {"attention", "experts", "kv_cache", "process"} <= memory.keys()
        kinds = sum(size for kind, size in memory.items() if kind != "process")
        assert 0 < kinds < memory["process"] and memory["kv_cache"] > 0
    assert {state["dp_rank"] for state in info["dp_ranks"]} == {0, 1}


def test_operations_and_requests_at_once_leave_nothing_behind(served: Served) -> None:
    """Operations reach ranks at different moments; all carry them out between the same two steps."""
    paths = ["/flush_cache", "/dump_expert_distribution_record", "/stop_expert_distribution_record"]
    paths += ["/start_expert_distribution_record", "/slow_down"]
    with ThreadPoolExecutor(10) as pool:
        texts = [pool.submit(complete, served, [9] * 30, max_tokens=20, ignore_eos=True) for _ in range(8)]
        operations = [pool.submit(control, served, path) for path in paths * 4]
        assert all(operation.result()["ok"] for operation in operations)
        assert len({text.result()["choices"][0]["text"] for text in texts}) == 1
    control(served, "/start_expert_distribution_record")
    wait_idle(served)
    assert gauge(served, "wideep:num_open_reqs") == 0 and gauge(served, "wideep:kv_used_tokens") == 0
