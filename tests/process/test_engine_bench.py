"""The engine benchmark on CPU: real ranks, a folder that holds every figure, errors that name the key."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from toolkit.config.engine import EngineConfig
from toolkit.config.mapping import from_mapping
from toolkit.config.model import ModelConfig as Model
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.bench import rank as ranks
from toolkit.engine.bench.__main__ import CONF, _report, arguments, bench, main, make_job
from toolkit.engine.bench.rank import Job
from toolkit.engine.bench.roofline import Rates, Roofline
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups
from toolkit.engine.runner import ModelRunner
from toolkit.records.experts import read_rebalances


def test_two_ranks_leave_a_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    arguments = [
        "--model",
        "tiny",
        "--parallel",
        "dep2",
        "--device",
        "cpu",
        "--isl",
        "12",
        "--osl",
        "8",
        "--batch",
        "2",
    ]
    assert main([*arguments, "--profile-steps", "2", "--out", str(folder), "--set", "engine.page_size=4"]) == 0
    (row,) = json.loads((folder / "bench.json").read_text())
    assert row["batch"] == 2 and row["decode_steps"] == 7
    assert 0 < row["decode_share"] < 1 and 0 < row["prefill_share"] < 1
    assert row["decode_tok_s_gpu"] == pytest.approx(2 / row["step_ms_median"] * 1e3, rel=0.9)
    for rank in (0, 1):
        steps = json.loads((folder / f"rank-{rank}.json").read_text())["points"][0]["steps"]
        assert sum(prefill for _, prefill, _, _ in steps) == 24
        assert sum(decode for _, _, decode, _ in steps) == 14
    kernels = list(csv.DictReader((folder / "kernels.csv").open()))
    assert {k["rank"] for k in kernels} == {"0", "1"}
    assert "| 2 |" in (folder / "bench.md").read_text()
    assert (folder / "trace-batch-2.json.gz").is_file() and (folder / "rank-1.log").is_file()


def fails_at_the_second_batch(job: Job, number: int) -> None:
    """One rank, right before it would leave its second point; the other has it."""
    point = ranks._point

    def broken(runner: ModelRunner, groups: Groups, job: Job, batch: int, folder: Path) -> ranks.Point:
        found = point(runner, groups, job, batch, folder)
        if batch == 2 and number == 1:
            raise RuntimeError("no second point")
        return found

    ranks._point = broken
    ranks.run(job, number)


def test_a_rank_that_fails_loses_no_batch_size_that_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(
        ["--model", "tiny", "--parallel", "dep2", "--device", "cpu", "--isl", "4", "--osl", "6", "--batch", "1", "2",
         "--profile-steps", "1", "--out", str(tmp_path), "--set", "engine.page_size=4"]
    )  # fmt: skip
    assert bench(asked, fails_at_the_second_batch, _report) == 1
    assert "rank 1 failed: see" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "bench.json").read_text())
    assert row["batch"] == 1
    assert "| 1 |" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no_such"], ["--model no_such", "qwen3_30b_a3b"]),
        (["--set", "engine.page_sice=4"], ["engine.page_sice", "page_size"]),
        (["--set", "page_size=4"], ["group.key=value"]),
        (["--parallel", "tep3"], ["parallel.ep_size=3"]),
    ],
)
def test_a_mistake_is_named(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_a_model_that_builds_on_another_is_composed() -> None:
    arguments_ = arguments(["--model", "deepseek_v3_fp8", "--set", "model.hf_config.num_hidden_layers=12"])
    job = make_job(arguments_)
    assert job.model.hf_config is not None
    assert job.model.hf_config["num_hidden_layers"] == 12 and job.model.hf_config["hidden_size"] == 7168
    assert job.model.hf_config["quantization_config"]["quant_method"] == "fp8"


def test_the_floor_of_a_known_shape() -> None:
    """Qwen3-30B-A3B, DEP=4, bf16, 4.3 TB/s: what reading weights and cache takes, worked out by hand."""
    import yaml

    values = yaml.safe_load((CONF / "model" / "qwen3_30b_a3b.yaml").read_text())
    values.pop("defaults")
    arch = read_arch(from_mapping(values, Model))
    dims = ParallelDims.of(ParallelConfig(4, 4, 4, enable_dp_attention=True))
    roofline = Roofline(arch, dims, EngineConfig(), "bfloat16")
    rates = Rates(4.3e12, 790e12)
    experts = 48 * 32 * 3 * 2048 * 768 * 2  # 14.5 GB
    attention = 48 * (2048 * (4096 + 1024) + 4096 * 2048 + 2 * 128) * 2
    head = 151936 * 2048 * 2 / 4
    kv = 256 * 1088 * 48 * 2 * 4 * 128 * 2
    floor = roofline.decode(256, 1088)
    assert floor.num_bytes == pytest.approx(experts + attention + head + kv, rel=0.01)
    assert 256 / floor.seconds(rates) == pytest.approx(25_000, rel=0.1)
    assert 32 / roofline.decode(32, 1088).seconds(rates) == pytest.approx(6_800, rel=0.1)
    # prefill is arithmetic: 3.3 billion active parameters but for the embedding
    active = 48 * (18_874_368 + 8 * 3 * 2048 * 768)
    assert roofline.prefill(16384, 1024).flops == pytest.approx(2 * 16384 * active, rel=0.2)


def test_a_rebalance_while_a_batch_is_served_is_timed(tmp_path: Path) -> None:
    from toolkit.engine.bench import migration

    given = ["--model", "tiny", "--parallel", "dep2", "--device", "cpu", "--isl", "12", "--osl", "40", "--batch", "2"]
    options = ["engine.page_size=4", "engine.ep_num_redundant_experts=2", "engine.eplb_rebalance_layers_per_chunk=1"]
    assert migration.main([*given, "--out", str(tmp_path), "--set", *options]) == 0
    records = read_rebalances(tmp_path)
    assert len(records) > len(migration.SHARES) and all(line.moved_slots for line in records)
    assert all(line.state == "done" and line.chunks == 2 == len(line.sent_bytes) for line in records)
    assert sum(records[1].sent_bytes) < sum(records[-1].sent_bytes), "5 % of the slots, and all of them"
    results = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for result in results:
        points = result["points"]
        assert [point["share"] for point in points] == [0.0, *migration.SHARES]
        assert points[0]["moving"] == points[0]["paused"] == [] and len(points[0]["rest"]) == 39
        assert all(len(point["rest"] + point["moving"] + point["paused"]) == 39 for point in points)
    assert "| 100% |" in (tmp_path / "migration.md").read_text()
