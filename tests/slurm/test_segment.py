"""NVLink domains: ``cluster.segment`` on Slurm 24.11 of Debian 13 (``make test-slurm-segment``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import debian13
from tests.slurm.cluster import Cluster, ClusterError, check_machine
from tests.slurm.runs import SHORT, Run
from tests.slurm.settings import FOLDER, Layout

pytestmark = pytest.mark.slow


@pytest.fixture
def racks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Eight nodes, two NVLink domains of four."""
    folder = FOLDER.with_name(f"{FOLDER.name}-13")
    layout = Layout(folder, 8, gpus=4, port=19817, root=str(debian13.ROOT), block=4)
    try:
        check_machine(layout)
        debian13.enter()
    except (ClusterError, RuntimeError) as error:
        pytest.skip(f"no Slurm 24.11 here: {error}")
    cluster = Cluster(layout)
    try:
        cluster.up()
        monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        yield cluster
    finally:
        cluster.down()
        debian13.leave()


def test_the_nodes_of_a_worker_are_of_one_domain(racks: Cluster, tmp_path: Path) -> None:
    racks.run("sbatch", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    words = ["parallel=dep4", "cluster.gpus_per_node=1", "cluster.segment=4", *SHORT]
    run = Run(tmp_path, *words, inside=racks.layout.root)
    code, output = run.end()
    assert code == 0, output + run.story()
    assert "RUNNING on node[5-8]" in output, "the first domain has a busy node"


def test_a_segment_larger_than_a_domain_is_refused_in_slurms_words(racks: Cluster, tmp_path: Path) -> None:
    words = ["parallel=dep8", "cluster.gpus_per_node=1", "cluster.segment=8", *SHORT]
    run = Run(tmp_path, *words, inside=racks.layout.root)
    output = run.process.communicate(timeout=120)[0]
    assert run.process.returncode == 2
    assert "Slurm did not take the job" in output and "topology" in output
