"""The plan, the checks before a start, and the native adapter's commands."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch_experiment import experiment
from toolkit.engine.args import TOKEN_ENV, read_frontend_args, read_worker_args
from toolkit.launch import check, ports
from toolkit.launch.adapters import adapters
from toolkit.launch.check_model import will_build
from toolkit.launch.plan import num_ports, plan

# --- plan -------------------------------------------------------------------------------------------


def test_ranks_fill_nodes_in_order() -> None:
    cfg = experiment(
        parallel={"tp_size": 16, "dp_size": 8, "ep_size": 16},
        cluster={"launcher": "slurm", "device": "cuda", "gpus_per_node": 8},
    )
    deployment = plan(cfg, 25_000)
    assert (deployment.num_nodes, deployment.num_gpus) == (2, 16)
    ranks = list(deployment.ranks())
    assert [(r.node, r.local_rank) for r in ranks] == [(rank // 8, rank % 8) for rank in range(16)]
    assert [(r.dp_rank, r.attn_tp_rank, r.ep_rank) for r in ranks] == [(r // 2, r % 2, r) for r in range(16)]


def test_a_local_deployment_is_one_node_whatever_its_size() -> None:
    cfg = experiment(parallel={"tp_size": 16, "dp_size": 16, "ep_size": 8}, cluster={"gpus_per_node": 4})
    assert plan(cfg, 25_000).num_nodes == 1


def test_ports_are_distinct_and_consecutive() -> None:
    cfg = experiment()
    used = plan(cfg, 25_000).ports()
    assert sorted(used) == [(0, port) for port in range(25_000, 25_000 + num_ports(cfg))]
    assert len(set(used.values())) == len(used)


def test_a_plan_is_json() -> None:
    deployment = plan(experiment(), 25_000)
    assert json.loads(json.dumps(deployment.to_json()))["workers"][0]["ranks"][3]["inbox_port"] == 25_007


def test_api_servers_follow_the_gpus_that_generate() -> None:
    def num(gpus: int, **deploy: Any) -> int:
        parallel = {"tp_size": gpus, "dp_size": gpus, "ep_size": gpus}
        cluster = {"launcher": "slurm", "device": "cuda", "gpus_per_node": 8}
        return plan(experiment(parallel=parallel, deploy=deploy, cluster=cluster), 25_000).frontend.api_servers

    assert [num(gpus) for gpus in (1, 2, 4, 8, 32, 64)] == [1, 1, 2, 4, 16, 16]
    assert num(8, api_servers=3) == 3
    assert plan(experiment(), 25_000).frontend.api_servers == 1, "ranks on CPU generate little"
    (error,) = check.check(experiment(deploy={"api_servers": 100}))
    assert "deploy.api_servers=100 must be 0 to 64" in error


# --- check ------------------------------------------------------------------------------------------


def test_a_sound_experiment_has_no_errors() -> None:
    assert check.check(experiment()) == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"parallel": {"ep_size": 3}}, r"parallel\.ep_size=3 does not divide"),
        ({"parallel": {"enable_dp_attention": False}}, r"needs parallel\.enable_dp_attention=true"),
        ({"engine": {"ep_num_redundant_experts": 1}}, r"ep_size=4 does not divide 9 slots.*use 4 redundant experts"),
        ({"engine": {"moe_a2a_backend": "all2all"}}, r"engine\.moe_a2a_backend=all2all.*did you mean all_to_all"),
        ({"engine": {"moe_a2a_backend": "deepep"}}, r"=deepep runs on GPUs, but cluster\.device=cpu: use .*all_to_all"),
        ({"engine": {"moe_runner_backend": "deep_gemm"}}, r"=deep_gemm runs on GPUs, but cluster\.device=cpu"),
        ({"deploy": {"router": "rr"}}, r"deploy\.router=rr is not known, use one of: .*round_robin"),
        ({"deploy": {"api_key_env": "NO_SUCH_VARIABLE"}}, r"NO_SUCH_VARIABLE.*is not set"),
        ({"cluster": {"port": 70_000}}, r"cluster\.port=70000: the run takes 8 ports"),
        ({"cluster": {"results_dir": "/dev/null/results"}}, r"cluster\.results_dir=/dev/null/results cannot be made"),
        ({"exp": "a/b"}, r"exp='a/b' must be a folder name"),
        ({"model": {"load_format": "auto"}}, r"model\.hf_config is given, but model\.load_format=auto"),
        ({"model": {"hf_config": None, "path": "/no/model"}}, r"model\.path=/no/model has no config\.json"),
        ({"model": {"tokenizer": "/no/tokenizer"}}, r"model\.tokenizer=/no/tokenizer has no tokenizer\.json"),
        ({"model": {"build": "gpt5", "path": "/no/model"}}, r"model\.build=gpt5 is not known"),
        ({"load": {"concurrency": []}}, r"load\.concurrency=\[\]"),
        ({"load": {"osl": 0}}, r"load\.osl=0"),
        ({"load": {"dataset": "nowhere"}}, r"load\.dataset=nowhere is not known"),
        ({"load": {"dataset_path": "/no/file"}}, r"load\.dataset_path=/no/file is not a file"),
        ({"load": {"dataset": "random", "isl": 500, "osl": 20}}, r"load\.isl=500 \+ load\.osl=20 is longer"),
        ({"engine": {"max_total_tokens": 10**12}}, r"4 ranks on this machine need .*kv_cache"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(groups: dict[str, Any], message: str) -> None:
    errors = check.check(experiment(**groups))
    assert any(re.search(message, error) for error in errors), errors


def test_slurm_needs_its_commands_unless_nothing_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cfg = experiment(cluster={"launcher": "slurm"})
    (error,) = check.check(cfg)
    assert re.search(r"cluster\.launcher=slurm: sbatch .*is not installed here.*emit=sbatch.*dry_run=true", error)
    assert check.check(dataclasses.replace(cfg, dry_run=True)) == []
    assert check.check(dataclasses.replace(cfg, emit="sbatch")) == []


def test_all_mistakes_are_told_at_once() -> None:
    errors = check.check(
        experiment(engine={"moe_a2a_backend": "x"}, load={"osl": 0}, parallel={"ep_size": 3}, deploy={"router": "x"})
    )
    assert len(errors) == 4


def test_gpu_memory_is_compared_with_what_a_rank_needs() -> None:
    cluster = {"launcher": "slurm", "device": "cuda", "gpu_memory_gb": 0.001}
    cfg = dataclasses.replace(experiment(cluster=cluster), dry_run=True)
    (error,) = check.check(cfg)
    assert error.startswith("cluster.gpu_memory_gb=0.001: weights and KV cache need")
    larger = dataclasses.replace(cfg, cluster=dataclasses.replace(cfg.cluster, gpu_memory_gb=80.0))
    assert check.check(larger) == []


def test_uneven_nodes_are_refused() -> None:
    cfg = experiment(cluster={"launcher": "slurm", "device": "cuda", "gpus_per_node": 3})
    errors = check.check(dataclasses.replace(cfg, dry_run=True))
    assert errors == ["parallel.tp_size=4 does not fill nodes of cluster.gpus_per_node=3 evenly: use a multiple of 3"]


def test_a_taken_port_is_named_with_its_owner() -> None:
    base = ports.free_range(num_ports(experiment()))
    with socket.create_server(("127.0.0.1", base + 2)):
        (error,) = check.check(experiment(cluster={"port": base}))
    assert f"port {base + 2} is in use, taken by pid {os.getpid()}" in error
    assert check.check(experiment(cluster={"port": base})) == []


def test_a_model_that_will_be_built_is_not_missed(tmp_path: Path) -> None:
    keys = {"hf_config": None, "load_format": "auto", "tokenizer": "", "path": str(tmp_path / "m")}
    cfg = experiment(model={**keys, "build": "smollm2_moe"})
    assert will_build(cfg.model)
    assert check.check(cfg) == []
    assert check.check(experiment(model=keys)) != []


def test_the_names_that_are_checked_are_those_the_engine_offers() -> None:
    from toolkit.engine.attention import (  # noqa: F401  register themselves
        backend,
        fa3,
        flash_mla,
        sdpa,
        triton_decode,
        varlen,
    )
    from toolkit.engine.moe import (  # noqa: F401
        all_to_all,
        allgather,
        deep_gemm,
        deepep,
        dispatch,
        gemm,
        grouped_mm,
        nvlink,
        triton_gemm,
    )

    tables = {
        "engine.moe_a2a_backend": set(dispatch.DISPATCHERS),
        "engine.attention_backend": {"auto", *backend.BACKENDS},
        "engine.moe_runner_backend": {"auto", *gemm.GEMMS},
        "engine.backend": set(adapters()),
    }
    for field, known in tables.items():
        assert set(check.NAMES[field]) == known


# --- native adapter ---------------------------------------------------------------------------------


def test_native_commands_word_by_word() -> None:
    cfg = experiment(parallel={"tp_size": 2, "dp_size": 2, "ep_size": 2}, cluster={"cpu_threads_per_rank": 3})
    specs = adapters()["native"](plan(cfg, 25_000), cfg, ["127.0.0.1"], Path("/runs/1")).specs
    module = [sys.executable, "-m"]
    assert [(spec.name, spec.node, list(spec.argv)) for spec in specs] == [
        ("rank-0", 0, [*module, "toolkit.engine.worker", "--args", "/runs/1/launch/worker-args.json", "--rank", "0"]),
        ("rank-1", 0, [*module, "toolkit.engine.worker", "--args", "/runs/1/launch/worker-args.json", "--rank", "1"]),
        ("frontend-0", 0, [*module, "toolkit.engine.frontend", "--args", "/runs/1/launch/frontend-args.json"]),
    ]
    assert {tuple(spec.env.items()) for spec in specs} == {
        (
            ("OMP_NUM_THREADS", "3"),
            ("MKL_NUM_THREADS", "3"),
            ("PYTHONUNBUFFERED", "1"),
            ("TOKENIZERS_PARALLELISM", "false"),
            ("HF_HUB_OFFLINE", "1"),
            ("GLOO_SOCKET_IFNAME", "lo"),
        )
    }


def test_native_arguments_on_two_nodes(tmp_path: Path) -> None:
    cfg = experiment(cluster={"launcher": "slurm", "device": "cuda", "gpus_per_node": 2})
    processes = adapters()["native"](plan(cfg, 25_000), cfg, ["n7", "n9"], tmp_path)
    (tmp_path / "launch").mkdir()
    for name, content in processes.files.items():
        (tmp_path / name).write_bytes(content)
    worker = read_worker_args(tmp_path / "launch/worker-args.json")
    assert worker.rank_hosts == ["n7", "n7", "n9", "n9"]
    assert worker.local_ranks == [0, 1, 0, 1]
    assert worker.inbox_ports == [25_004, 25_005, 25_006, 25_007]
    assert (worker.dist_port, worker.frontend) == (25_003, ("n7", 25_002))
    assert (worker.model, worker.parallel, worker.engine) == (cfg.model, cfg.parallel, cfg.engine)
    assert worker.experts_path == str(tmp_path / "experts.npz")
    frontend = read_frontend_args(tmp_path / "launch/frontend-args.json")
    assert frontend.http == ("127.0.0.1", 25_000)
    (address,) = frontend.workers
    assert (address.pool, address.inbox) == ("agg", worker.frontend)
    assert address.rank_inboxes == list(zip(worker.rank_hosts, worker.inbox_ports, strict=True))
    assert [spec.node for spec in processes.specs] == [0, 0, 1, 1, 0]
    assert "GLOO_SOCKET_IFNAME" not in processes.specs[0].env
    assert TOKEN_ENV not in str(processes)


# --- disaggregated ----------------------------------------------------------------------------------

TWO = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}


def disagg(**more: Any) -> dict[str, Any]:
    return {"mode": "disagg", "prefill": {"parallel": TWO}, "decode": {"parallel": TWO, "workers": 2}} | more


def test_pools_have_their_own_workers_ports_and_gpus() -> None:
    deployment = plan(experiment(deploy=disagg()), 25_000)
    assert [worker.name for worker in deployment.workers] == ["prefill0", "decode0", "decode1"]
    assert deployment.mapping == "1 prefill DEP=2 + 2 decode DEP=2"
    assert [(r.node, r.local_rank) for r in deployment.ranks()] == [(0, i) for i in range(6)]
    assert len(deployment.ports()) == num_ports(experiment(deploy=disagg())) == 14
    assert deployment.main_worker.name == "decode0"


def test_a_pool_begins_on_its_own_node_and_its_workers_share_nodes() -> None:
    cluster = {"launcher": "slurm", "device": "cuda", "gpus_per_node": 4}
    deploy = disagg(decode={"parallel": TWO | {"tp_size": 2}, "workers": 3})
    deployment = plan(experiment(deploy=deploy, cluster=cluster), 25_000)
    assert [[(r.node, r.local_rank) for r in worker.ranks] for worker in deployment.workers] == [
        [(0, 0), (0, 1)], [(1, 0), (1, 1)], [(1, 2), (1, 3)], [(2, 0), (2, 1)],
    ]  # fmt: skip
    assert [(pool.name, pool.first_node, pool.num_nodes) for pool in deployment.pools] == [
        ("prefill", 0, 1), ("decode", 1, 2),
    ]  # fmt: skip


def test_each_rank_is_told_its_part(tmp_path: Path) -> None:
    cfg = experiment(deploy=disagg(prefill={"parallel": TWO, "engine": {"max_running_requests": 3}}))
    files = adapters()["native"](plan(cfg, 25_000), cfg, ["127.0.0.1"], tmp_path).files
    for name, content in files.items():
        (tmp_path / Path(name).name).write_bytes(content)
    prefill, decode = (read_worker_args(tmp_path / f"{name}-args.json") for name in ("prefill0", "decode1"))
    assert (prefill.engine.max_running_requests, decode.engine.max_running_requests) == (3, 64)
    assert (prefill.engine.disable_radix_cache, decode.engine.disable_radix_cache) == (False, True)
    assert prefill.disaggregation is not None and prefill.disaggregation.mode == "prefill"
    assert decode.disaggregation is not None and decode.disaggregation.backend == "local"
    assert decode.steps_dir == str(tmp_path / "workers" / "decode1")
    frontend = read_frontend_args(tmp_path / "frontend-args.json")
    assert [(worker.name, worker.pool) for worker in frontend.workers] == [
        ("prefill0", "prefill"), ("decode0", "decode"), ("decode1", "decode"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("deploy", "message"),
    [
        ({"decode": {"engine": {"page_size": 32}}}, r"prefill\.engine\.page_size=16 and .*page_size=32 differ"),
        ({"prefill": {"workers": 0}}, r"deploy\.prefill\.workers=0 must be at least 1"),
        ({"transfer_timeout_s": 0}, r"deploy\.transfer_timeout_s=0.* must be positive"),
        ({"disaggregation_transfer_backend": "rdma"}, r"disaggregation_transfer_backend=rdma is not known"),
        ({"decode": {"parallel": TWO | {"ep_size": 3}}}, r"deploy\.decode\.parallel\.ep_size=3 does not divide"),
        ({"prefill": {"engine": {"chunked_prefill_size": 0}}}, r"deploy\.prefill\.engine\.chunked_prefill_size=0"),
    ],
)
def test_a_mistake_in_a_pool_is_told(deploy: dict[str, Any], message: str) -> None:
    errors = check.check(experiment(deploy=disagg(**deploy)))
    assert any(re.search(message, error) for error in errors), errors


def test_an_unknown_key_of_a_pool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"deploy\.decode\.engine\.page_sise.*did you mean page_size"):
        experiment(deploy=disagg(decode={"engine": {"page_sise": 8}}))


def test_transfers_that_are_checked_are_those_the_engine_offers() -> None:
    from toolkit.engine.kv.transfer import TRANSFERS
    from toolkit.launch.check_disagg import TRANSFERS as CHECKED

    assert set(CHECKED) == set(TRANSFERS)
