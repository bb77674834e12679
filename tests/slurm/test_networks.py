"""Nodes with networks of their own, and a cluster with accounting: what differs there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, check_machine
from tests.slurm.runs import SHORT, Run
from tests.slurm.settings import FOLDER, Layout
from tests.unit.launch_experiment import experiment
from toolkit.launch import check, queue
from toolkit.records.requests import read_requests
from toolkit.records.steps import read_transfers

pytestmark = pytest.mark.slow


def bring_up(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    try:
        check_machine(layout)
    except ClusterError as error:
        pytest.skip(f"no such cluster here: {error}")
    cluster = Cluster(layout)
    cluster.up()
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    return cluster


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = bring_up(Layout(FOLDER.with_name(f"{FOLDER.name}-netns"), 2, mode="netns", port=17817), monkeypatch)
    yield cluster
    cluster.down()


@pytest.fixture
def accounted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = bring_up(Layout(FOLDER.with_name(f"{FOLDER.name}-acct"), 2, accounting=True, port=18817), monkeypatch)
    yield cluster
    cluster.down()


def test_ranks_talk_over_the_network_between_their_nodes(networks: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "parallel=dep4", "cluster.gpus_per_node=2", *SHORT)
    code, output = run.end()
    assert code == 0, output + run.story()
    args = json.loads((run.folder / "launch/worker-args.json").read_text())
    assert args["rank_hosts"] == ["10.213.0.11", "10.213.0.11", "10.213.0.12", "10.213.0.12"]


def test_prefill_and_decode_are_components_of_one_job_and_kv_goes_from_node_to_node(
    networks: Cluster, tmp_path: Path
) -> None:
    pytest.importorskip("nixl_cu13", reason="KV between nodes needs nixl-cu13")
    pools = ["deploy=disagg", "+cluster.pools.prefill.mem=2000", "+cluster.pools.decode.mem=3000"]
    # The nodes of the test cluster are one kernel's, over whose memory UCX would reach from one to the other.
    run = Run(tmp_path, *pools, "cluster.gpus_per_node=2", "+cluster.env.UCX_TLS=tcp", *SHORT)
    code, output = run.end()
    assert code == 0, output + run.story()
    first, _, second = (run.folder / "launch/run.sbatch").read_text().partition("#SBATCH hetjob")
    assert "--mem=2000" in first and "--mem=3000" in second, "each pool asks for its own"
    plan = json.loads((run.folder / "plan.json").read_text())
    assert [(pool["name"], pool["num_nodes"]) for pool in plan["pools"]] == [("prefill", 1), ("decode", 1)]
    states = {p.stem: json.loads(p.read_text())["host"] for p in (run.folder / "launch").glob("*[0-9]-[0-9].json")}
    assert states["prefill0-0"] == states["prefill0-1"] != states["decode0-0"] == states["decode0-1"]
    sent = read_requests(run.folder)
    handed_on = read_transfers(run.folder)
    assert len(handed_on) == len(sent) > 0 and (handed_on.bytes > 0).all(), "every prompt's KV came from the other node"


def test_an_interface_that_is_not_there_is_named_with_those_that_are(networks: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, "parallel=dep2", "cluster.gpus_per_node=1", "cluster.network_interface=ib0", *SHORT)
    code, output = run.end()
    assert code == 1
    assert "cluster.network_interface=ib0 is not there: use one of: eth0, lo" in output


def test_with_accounting_the_account_is_checked_and_old_jobs_are_known(accounted: Cluster, tmp_path: Path) -> None:
    def errors(account: str) -> list[str]:
        return check.check(experiment(cluster={"launcher": "slurm", "gpus_per_node": 4, "account": account}))

    assert errors("research") == []
    (error,) = errors("reserch")
    assert error == "cluster.account=reserch is not known, use one of: research, root; did you mean research?"
    run = Run(tmp_path, "parallel=dep2", "cluster.gpus_per_node=1", "cluster.account=research", *SHORT)
    code, output = run.end()
    assert code == 0, output + run.story()
    assert queue._accounted(run.job.job_id).state == "COMPLETED"
    assert os.environ["SLURM_CONF"] == accounted.env["SLURM_CONF"]
