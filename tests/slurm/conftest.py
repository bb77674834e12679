"""One cluster for all tests here, brought up once; each test gets it with every node idle and no job left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, check_machine, wait
from tests.slurm.settings import FOLDER, Layout

NODES = 18  # a rack; most tests take two or four


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ``make test-slurm`` leaves out is marked ``slow``; everything here is marked ``slurm``."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1200))  # a whole job each, on a machine that may be busy


@pytest.fixture(scope="session")
def whole_cluster() -> Iterator[Cluster]:
    """A running cluster without accounting; skips, with the reason, where there can be none."""
    layout = Layout(FOLDER, NODES)
    try:
        check_machine(layout)
    except ClusterError as error:
        pytest.skip(f"no Slurm cluster here: {error}")
    cluster = Cluster(layout)
    cluster.up()
    before = os.environ.get("SLURM_CONF")
    os.environ |= cluster.env
    yield cluster
    if before is None:
        del os.environ["SLURM_CONF"]
    cluster.down()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    yield whole_cluster
    whole_cluster.run("scancel", "--user=root", check=False)
    wait(lambda: not whole_cluster.run("squeue", "-h").strip(), "every job is gone")
    wait(lambda: len(whole_cluster.idle_nodes()) == NODES, "every node is idle again")
