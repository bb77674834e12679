"""Counts and placements in and out, and the command line on real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.eplb.test_planner import skewed
from toolkit.engine.eplb import formats
from toolkit.engine.eplb.__main__ import main
from toolkit.engine.eplb.planner import plan
from toolkit.records.experts import ExpertCounts, write_experts

LAYERS = (1, 2, 3)  # the model's layer 0 is dense


@pytest.fixture
def counts() -> np.ndarray:
    """[windows, model layers, experts], as SGLang dumps it: the dense layer's row is zero."""
    load = np.zeros((2, 4, 16), np.int64)
    load[:, 1:] = (skewed(3, 16) * 1000).astype(np.int64)
    return load


def read(spec: object, slots: int = 20) -> np.ndarray:
    return formats.read_placement(str(spec), LAYERS, 16, slots, 4)


def test_trivial_repeats_the_experts_in_order() -> None:
    assert read("trivial").tolist() == [[*range(16), 0, 1, 2, 3]] * 3


@pytest.mark.parametrize("name", ["placement.json", "placement.pt"])
def test_a_written_placement_is_read_back(name: str, tmp_path: Path) -> None:
    placed = plan(skewed(3, 16), 20, num_gpus=4).phy2log_LR
    formats.write_placement(tmp_path / name, placed, LAYERS)
    assert (read(tmp_path / name) == placed).all()
    rows = formats.read_placement(str(tmp_path / name), range(4), 16, 20, 4)
    assert rows[0].tolist() == [*range(16), 0, 1, 2, 3], "SGLang wants a row for the dense layer, too"


def test_tensorrt_llm_gets_the_moe_layers_under_the_models_index(tmp_path: Path) -> None:
    placed = plan(skewed(3, 16), 20, num_gpus=4).phy2log_LR
    formats.write_placement(tmp_path / "eplb.yaml", placed, LAYERS, layer_updates_per_iter=2)
    content = yaml.safe_load((tmp_path / "eplb.yaml").read_text())
    assert content["num_slots"] == 20 and content["layer_updates_per_iter"] == 2
    assert content["initial_global_assignments"] == dict(zip(LAYERS, placed.tolist()))
    again, layers = formats.read_trtllm(tmp_path / "eplb.yaml")
    assert (again == placed).all() and layers == LAYERS


def test_logical_counts_are_planned_from_whatever_their_axes(counts: np.ndarray, tmp_path: Path) -> None:
    expected = plan(counts[:, 1:].sum(0), 20, num_gpus=4).phy2log_LR
    formats.write_dump(tmp_path / "dump.pt", counts)
    assert (read(tmp_path / "dump.pt") == expected).all()
    assert (read(json.dumps({"logical_count": counts.sum(0).tolist()})) == expected).all()
    (tmp_path / "count.json").write_text(json.dumps({"logical_count": counts[:, 1:].tolist()}))
    assert (read(tmp_path / "count.json") == expected).all()


def test_dumps_are_sglangs(counts: np.ndarray, tmp_path: Path) -> None:
    formats.write_dump(tmp_path / "stat.pt", counts, 0.8)
    raw = torch.load(tmp_path / "stat.pt", weights_only=True)
    assert raw["rank"] == 0 and raw["average_utilization_rate_over_window"] == 0.8
    assert raw["logical_count"].shape == (2, 4, 16)
    assert (formats.read_counts(tmp_path / "stat.pt").counts_WLE == counts).all()
    physical, phy2log = np.arange(40).reshape(2, 20), np.tile(np.arange(20) % 16, (2, 1))
    records = [{"forward_pass_id": n, "rank": 0, "global_physical_count": torch.from_numpy(physical)} for n in (1, 2)]
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(phy2log)}, tmp_path / "pass.pt")
    passes = formats.read_counts(tmp_path / "pass.pt").counts_WLE
    assert passes.shape == (2, 2, 16) and passes[0, 0, 0] == 0 + 16 and passes.sum() == 2 * physical.sum()


def test_a_dump_of_a_server_that_saw_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.write_dump(tmp_path / "zero.pt", np.zeros((3, 4, 16), np.int64))
    assert sorted(set(read(tmp_path / "zero.pt")[0].tolist())) == list(range(16))
    assert main(["plan", str(tmp_path / "zero.pt"), "--slots", "20", "--gpus", "4"]) == 0
    assert "all zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trivia", "is not known: use trivial"),
        ("missing.pt", "is not a file"),
        ("{broken", "is not JSON"),
        ('{"other": 1}', "neither physical_to_logical_map nor logical_count"),
        ('{"physical_to_logical_map": [[0, 1], [0]]}', "must be an array of whole numbers"),
        (json.dumps({"physical_to_logical_map": [[*range(16)]] * 3}), "use ep_num_redundant_experts=0"),
        (json.dumps({"physical_to_logical_map": [[0] * 20] * 3}), "no slot for expert 1"),
        (json.dumps({"physical_to_logical_map": [[*range(20)]] * 3}), "names expert 16"),
        (json.dumps({"physical_to_logical_map": [[*range(16), 0, 0, 0, 0]] * 2}), "has 2 layers"),
        (json.dumps({"logical_count": [[1] * 8] * 3}), "counts 8 experts"),
        (json.dumps({"logical_count": [[-1] * 16] * 3}), "negative"),
    ],
)
def test_what_cannot_be_used_is_explained(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(spec)


def test_counts_of_a_plain_archive(counts: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", logical=counts.sum(0))
    assert (formats.read_counts(tmp_path / "one.npz").load_LE == counts.sum(0)).all()
    np.savez(tmp_path / "two.npz", a=counts, b=counts)
    np.savez(tmp_path / "pickled.npz", a=np.array([Command()], object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in [("two", "neither the experts.npz"), ("pickled", "no archive of"), ("text", "no archive of")]:
        with pytest.raises(ValueError, match=message):
            formats.read_counts(tmp_path / f"{name}.npz")


class Command:
    """Stands for code that a pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_nothing_is_unpickled_but_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"physical_to_logical_map": Command()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read(tmp_path / "evil.pt")
    for text in ("no tensor", "abc", ""):  # torch has another error for each
        (tmp_path / "text.pt").write_text(text)
        with pytest.raises(ValueError, match="cannot be read as tensors"):
            read(tmp_path / "text.pt")
    assert "ran" not in capsys.readouterr().out


def test_the_command_plans_and_writes_for_each_engine(
    counts: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = ExpertCounts(
        counts[:, 1:], np.zeros((2, 2)), np.zeros((1, 3, 16), np.int32), np.zeros(1), np.array(LAYERS, np.int32), 4
    )
    write_experts(tmp_path / "experts.npz", experts)
    formats.write_dump(tmp_path / "dump.pt", counts)
    for name in ("experts.npz", "dump.pt"):
        outs = [tmp_path / f"{name}{suffix}" for suffix in (".json", ".pt", ".yaml")]
        words = ["plan", str(tmp_path / name), "--slots", "20", "--gpus", "4"]
        assert main([*words, *(word for out in outs for word in ("--out", str(out)))]) == 0
        placed = read(outs[0])
        assert (read(outs[1]) == placed).all()
        assert formats.read_trtllm(outs[2])[1] == LAYERS and (formats.read_trtllm(outs[2])[0] == placed).all()
        assert main([*words, "--prev", str(outs[0])]) == 0
    printed = capsys.readouterr().out
    assert "balancedness planned" in printed and "slots that need another expert: 0 of" in printed
    assert main(["plan", str(tmp_path / "dump.pt"), "--slots", "21", "--gpus", "4"]) == 2
    assert "use 24 slots" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none.pt"), "--slots", "20", "--gpus", "4"]) == 2


def test_the_curve_as_table_and_picture(counts: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.write_dump(tmp_path / "dump.pt", counts)
    png = tmp_path / "curve.png"
    words = ["curve", str(tmp_path / "dump.pt"), "--gpus", "2", "4", "--redundant", "0", "4", "8", "--png", str(png)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6 + 1 and lines[1].split()[:2] == ["2", "16"]
    bare, most = float(lines[4].split()[4]), float(lines[6].split()[4])
    assert bare < most, "redundant slots help"
    assert png.read_bytes().startswith(b"\x89PNG")
