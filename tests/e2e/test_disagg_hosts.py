"""Prefill and decode on two hosts with a network between them: network namespaces, TCP only, 2 x 2 ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.e2e.processes import processes
from tests.e2e.test_disagg import DEP2, ENGINE, PROMPTS, aggregated, model_of
from toolkit.records.steps import read_transfers

NET, BRIDGE = "10.231.7", "kvbr0"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces on a bridge, which this process is on as well; their addresses by name."""
    pytest.importorskip("nixl_cu13")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, to make network namespaces")
    made = {f"kv{i}-{os.getpid()}": f"{NET}.{i}" for i in (1, 2)}
    try:
        try:
            ip("link", "add", BRIDGE, "type", "bridge")
            ip("addr", "add", f"{NET}.254/24", "dev", BRIDGE)
            ip("link", "set", BRIDGE, "up")
            for i, (name, address) in enumerate(made.items()):
                ip("netns", "add", name)
                ip("link", "add", f"kvveth{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", f"kvveth{i}", "master", BRIDGE, "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no networks of its own: {error.stderr.strip()}")
        yield made
    finally:
        for words in (*(("netns", "del", name) for name in made), ("link", "del", BRIDGE)):
            subprocess.run(["ip", *words], check=False, capture_output=True)


def test_kv_goes_over_tcp_between_two_hosts(
    hosts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (_, expected) = model_of("mixtral"), aggregated("mixtral")
    monkeypatch.setenv("UCX_TLS", "tcp")  # namespaces share memory, which UCX would find out
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("no_proxy", "*")
    (prefill, first), (decode, second) = hosts.items()
    deploy = {
        "mode": "disagg", "prefill": {"parallel": DEP2}, "decode": {"parallel": DEP2}, "host": first,
        "disaggregation_transfer_backend": "nixl",
    }  # fmt: skip
    inside = {"prefill0": prefill, "frontend": prefill, "decode0": decode}
    wrap = {f"{role}-{i}": ["nsenter", f"--net=/run/netns/{name}"] for role, name in inside.items() for i in range(2)}
    cluster = {"launcher": "slurm", "gpus_per_node": 2}  # for a plan with a node for each pool
    groups = {"model": model, "engine": ENGINE, "deploy": deploy, "cluster": cluster}
    with processes(tmp_path / "disagg", [first, second], wrap, **groups) as d:
        body = {"model": model["name"], "max_tokens": 10, "ignore_eos": True, "temperature": 0}
        for prompt, text in zip(PROMPTS, expected):
            got = requests.post(f"{d.url}/v1/completions", json=body | {"prompt": prompt}, timeout=60)
            assert [choice["text"] for choice in got.json()["choices"]] == [text]
        assert requests.post(f"{d.url}/flush_cache", timeout=30).status_code == 200  # and the rows of transfers
    transfers = read_transfers(tmp_path / "disagg")
    assert len(transfers) == len(PROMPTS) and (transfers["bytes"] > 0).all()
