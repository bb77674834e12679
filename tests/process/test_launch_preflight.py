"""Preflight: real processes look at this machine, as one node or as several; a bad node is named with every reason."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_launch_processes import make_folder
from tests.unit.launch_experiment import experiment
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping, to_mapping
from toolkit.launch import node_checks, ports
from toolkit.launch.clock import STAMP, measure_offset
from toolkit.launch.launcher import Node
from toolkit.launch.local import LocalLauncher
from toolkit.launch.node_checks import Ask, Report
from toolkit.launch.plan import DeploymentPlan, num_ports, plan
from toolkit.launch.preflight import BadNodes, ask_of, compare, preflight, read_bad


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "run")


def two_nodes(**health: Any) -> tuple[ExpConfig, DeploymentPlan, list[Node]]:
    """A deployment planned over two nodes, both of them this machine."""
    values = to_mapping(experiment(health=health))
    values["cluster"] |= {"launcher": "slurm", "gpus_per_node": 2}
    cfg = from_mapping(values, ExpConfig)
    first = ports.free_range(2 * num_ports(cfg))
    nodes = [Node("127.0.0.1", first), Node("127.0.0.1", first + num_ports(cfg))]
    return cfg, plan(cfg, [node.port for node in nodes]), nodes


def test_two_good_nodes_pass_and_leave_what_they_are(run_dir: Path) -> None:
    cfg, deployment, nodes = two_nodes()
    assert preflight(cfg, deployment, nodes, run_dir, LocalLauncher()) == []
    assert read_bad(run_dir) == []
    first, second = json.loads((run_dir / "nodes.json").read_text())
    assert first["threads"] > 0 and first["memory_bytes"] == second["memory_bytes"] > 0
    assert first["clock_offset_s"] is None
    assert abs(second["clock_offset_s"]) < 0.05, "one machine, one clock"


def test_a_bad_node_is_named_with_every_reason(run_dir: Path) -> None:
    cfg, deployment, nodes = two_nodes(min_disk_gb=1e9)
    taken = deployment.workers[0].ranks[2].inbox_port
    with socket.create_server(("", taken)), pytest.raises(BadNodes) as found:
        preflight(cfg, deployment, nodes, run_dir, LocalLauncher())
    assert [bad.node for bad in found.value.nodes] == [0, 1] and read_bad(run_dir) == found.value.nodes
    reasons = " ".join(found.value.nodes[1].reasons)
    assert f"port {taken} is in use" in reasons and "health.min_disk_gb=1e+09 are needed" in reasons
    assert "port" not in " ".join(found.value.nodes[0].reasons), "that one is the other node's"
    assert "2 bad nodes" in str(found.value)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_node_that_says_nothing_is_bad_and_no_other(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Nor is a node bad that asks the first one in vain."""
    from toolkit.launch import preflight as module

    specs = module.specs

    def some_broken(num_nodes: int, folder: Path) -> list[Any]:
        found = specs(num_nodes, folder)
        found[broken] = dataclasses.replace(found[broken], argv=("/no/such/python",))
        return found

    monkeypatch.setattr(module, "specs", some_broken)
    cfg, deployment, nodes = two_nodes()
    nodes = [dataclasses.replace(node, name=f"node{i}") for i, node in enumerate(nodes)]
    with pytest.raises(BadNodes) as found:
        preflight(cfg, deployment, nodes, run_dir, LocalLauncher())
    (bad,) = found.value.nodes
    assert (bad.node, bad.host) == (broken, f"node{broken}"), "by the name that the cluster has for it"
    assert "no report" in bad.reasons[0] and "could not start /no/such/python" in bad.reasons[0]


@pytest.fixture
def slow_clock() -> Iterator[int]:
    """The port of a clock that is half a second behind."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                while caller.recv(1):
                    caller.sendall(STAMP.pack(time.time() - 0.5))

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_the_offset_of_a_clock_is_measured(slow_clock: int) -> None:
    assert measure_offset("127.0.0.1", slow_clock, 5.0) == pytest.approx(0.5, abs=0.05)


def ask(**changes: Any) -> Ask:
    values: dict[str, Any] = {
        "run_dir": "/tmp", "device": "cpu", "ranks": [2, 2], "rank_bytes": 0, "hosts": ["127.0.0.1"] * 2,
        "ports": [[], []], "clock_port": 0, "min_disk_bytes": 0, "max_clock_offset_s": 0.05,
    }  # fmt: skip
    return Ask(**(values | changes))


def test_a_clock_that_is_off_is_a_problem(slow_clock: int) -> None:
    report = Report(problems=[])
    (problem,) = node_checks._clock_offset(ask(clock_port=slow_clock), report)
    assert "its clock is +5" in problem and "health.max_clock_offset_ms=50" in problem
    assert report.clock_offset_s is not None


def test_ranks_that_do_not_fit_into_memory_are_a_problem() -> None:
    (problem,) = node_checks._host_memory(ask(rank_bytes=10**12), 1, 64 * 10**9)
    assert problem == "64.0 GB of memory are free, its 2 ranks need 2000.0 GB"
    assert list(node_checks._host_memory(ask(rank_bytes=10**9), 1, 64 * 10**9)) == []


def test_the_odd_one_out_is_the_bad_one() -> None:
    def node(driver: str = "575.1", gpus: int = 8) -> Report:
        return Report(driver=driver, gpu_names=["NVIDIA H200"] * gpus)

    reports = {0: node(), 1: node("550.9"), 2: node()}
    assert compare(1, reports) == ["driver 550.9, the other nodes have 575.1"]
    assert compare(0, reports) == [] and compare(0, {0: node()}) == []


class FakeNvml:
    """NVML of a node with three GPUs: one too full, one with memory errors, and a pair without a link."""

    NVML_P2P_CAPS_INDEX_READ, NVML_P2P_STATUS_OK = 0, 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "575.1"

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return type("Memory", (), {"total": 141 * 10**9, "free": (20 if handle == 0 else 140) * 10**9})()

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [type("User", (), {"pid": 2**22 + 1})()] if handle == 0 else []

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, scope: int) -> int:
        return 3 if handle == 1 else 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 0x40 if handle == 2 else 0

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        return int((one, other) == (0, 2))


def test_gpus_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    report = Report(problems=[], warnings=[])
    problems = list(node_checks._gpus(ask(device="cuda", ranks=[4], rank_bytes=100 * 10**9), 0, report))
    assert problems[0] == "3 GPUs are seen, its 4 ranks need 4"
    assert problems[1].startswith("GPU 0: 20.0 GB free, a rank needs 100.0 GB, in use by pid 4194305 (of another")
    assert problems[2] == "GPU 1: 3 uncorrected memory errors since it was started"
    assert problems[3].startswith("no peer access between GPUs 0-2")
    assert report.warnings == ["GPU 2 is slowed down by heat before any work"]
    assert (report.driver, report.gpu_names) == ("575.1", ["NVIDIA H200"] * 3)


def test_every_port_of_the_plan_is_asked_for_on_its_node(run_dir: Path) -> None:
    cfg, deployment, nodes = two_nodes()
    asked = ask_of(cfg, deployment, nodes, run_dir)
    assert asked.ranks == [2, 2]
    assert [port for ports_of in asked.ports for port in ports_of if port in {r.inbox_port for r in deployment.ranks()}]
    assert deployment.workers[0].dist_port in asked.ports[0] and asked.clock_port in asked.ports[0]
    assert {r.inbox_port for r in deployment.ranks() if r.node == 1} <= set(asked.ports[1])
