"""Several runs: stacking, repeats, the Pareto front, comparison, and the command line over them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.unit.analysis_run import make_run
from toolkit import records
from toolkit.analysis import Run, Runs
from toolkit.analysis.__main__ import main
from toolkit.analysis.compare import compare
from toolkit.analysis.finish import complete_sweep
from toolkit.analysis.levels import combine
from toolkit.analysis.runs import front
from toolkit.records.requests import RequestRecord, read_requests, write_requests
from toolkit.records.sweep import SWEEP_COLUMNS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a, b (b: TTFT 30 ms later, another dispatcher), c (as a, a repeat), and a folder that is no run."""
    results = tmp_path_factory.mktemp("results")
    source = make_run(results / "source", points=(2, 8), requests_per_slot=8)
    for name in ("a", "b", "c"):
        (results / name).mkdir()
        shutil.copytree(source, results / name / "20260101-000000")
    (results / "notes").mkdir()
    shutil.rmtree(results / "source")
    folder = results / "b" / "20260101-000000"
    table = read_requests(folder)
    for column in ("first_token_s", "last_token_s", "end_s"):
        table[column] += 0.03
    rows = table.to_dict("records")
    shifted = [
        RequestRecord(**{str(k): v for k, v in row.items()} | {"chunk_s": [t + 0.03 for t in row["chunk_s"]]})
        for row in rows
    ]
    write_requests(folder, shifted)
    config = yaml.safe_load((folder / records.CONFIG).read_text())
    config["engine"]["moe_a2a_backend"] = "allgather"
    (folder / records.CONFIG).write_text(yaml.safe_dump(config))
    (folder / records.SWEEP).unlink()  # to be computed from the changed requests
    return results


def test_a_sweep_of_the_first_version_is_counted_anew(tmp_path: Path) -> None:
    """Its ``failed`` held the cancelled requests, and it had no column for them."""
    folder = make_run(tmp_path, points=(2, 8), requests_per_slot=8)
    rows = [RequestRecord(**{str(k): v for k, v in row.items()}) for row in read_requests(folder).to_dict("records")]
    mine = [row for row in rows if row.point == 1 and not row.warmup]
    for row, status in zip(mine, ("error", "cancelled", "cancelled")):
        row.status, row.error = status, status
    write_requests(folder, rows)
    table = pd.read_csv(folder / records.SWEEP).drop(columns="cancelled")
    table.loc[1, "failed"] += 3
    table.to_csv(folder / records.SWEEP, index=False)
    run = Run(folder)
    assert run.sweep[["failed", "cancelled"]].to_numpy().tolist() == [[0, 0], [2, 2]], "one had failed before"
    assert run.sweep["requests"].tolist() == table["requests"].tolist()
    assert any("of another version: it has no cancelled" in line for line in run.warnings)
    complete_sweep(run)
    assert Run(folder).sweep["cancelled"].tolist() == [0, 2]
    assert not Run(folder).warnings, "it is of this version now"


def test_runs_are_found_once_with_their_settings_as_columns(results: Path) -> None:
    runs = Runs.glob(str(results / "*" / "*"), str(results / "a" / "*"), str(results / "*"))
    assert [run.name for run in runs] == [f"{name}/20260101-000000" for name in "abc"]
    sweep = runs.sweep
    assert len(sweep) == 6 and set(SWEEP_COLUMNS) < set(sweep.columns)
    assert sweep["engine.moe_a2a_backend"].tolist() == ["all_to_all"] * 2 + ["allgather"] * 2 + ["all_to_all"] * 2
    assert runs.varying == ["engine.moe_a2a_backend"]
    assert len(runs.requests) == sum(len(run.requests) for run in runs)
    means = sweep.groupby("engine.moe_a2a_backend")["isl_mean"].mean()
    assert means.notna().all()


def test_repeats_are_put_together_and_their_spread_is_shown(results: Path) -> None:
    runs = Runs.glob(str(results / "*" / "*"))
    combined = runs.combined
    assert combined["repeats"].tolist() == [2, 2, 1, 1] and combined["runs"].tolist() == [2, 2, 1, 1]
    one = Run(results / "a" / "20260101-000000")
    other = Run(results / "b" / "20260101-000000")
    level = combine([*one.points, *other.points]).set_index("concurrency").loc[8]
    assert level["ttft_p50_ms_high"] - level["ttft_p50_ms_low"] > 20
    pooled = [p.requests for p in (one.points[1], other.points[1])]
    ok = pd.concat([rows[~rows["warmup"] & (rows["status"] == "ok")] for rows in pooled])
    assert level["ttft_p90_ms"] == pytest.approx(np.percentile(ok["first_token_s"], 90) * 1e3)
    assert level["requests"] == one.points[1].row["requests"] + other.points[1].row["requests"]
    rates = [run.points[1].row["output_tok_s"] for run in (one, other)]
    assert level["output_tok_s"] == pytest.approx(np.mean(rates))


def test_a_comparison_sees_what_changed_and_only_that(results: Path) -> None:
    a, b, c = (Run(results / name / "20260101-000000") for name in "abc")
    table = compare(a, b).set_index(["concurrency", "figure"])
    ttft = table.loc[(8, "ttft_mean_ms")]
    assert ttft["verdict"] == "higher"
    assert ttft["difference"] == pytest.approx(30, abs=1e-3) and ttft["low"] < 30 < ttft["high"]
    assert table.loc[(8, "tpot_mean_ms"), "verdict"] == "same within noise"
    same = compare(a, c)
    assert set(same["verdict"]) <= {"same within noise", "unknown"}
    assert set(same[same["figure"] == "ttft_p99_ms"]["verdict"]) == {"unknown"}  # 64 requests say nothing of a p99
    lower = compare(b, a).set_index(["concurrency", "figure"]).loc[(8, "ttft_mean_ms")]
    assert lower["verdict"] == "lower" and lower["difference"] == pytest.approx(-30, abs=1e-3)


def test_runs_without_a_common_load_are_refused_with_a_way_out(results: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, points=(3,), requests_per_slot=2)
    with pytest.raises(ValueError, match=r"share no load: run one of them with load\.concurrency"):
        compare(Run(results / "a" / "20260101-000000"), Run(other))


def test_the_front_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, 80).astype(float), rng.integers(0, 12, 80).astype(float)
    beaten = [
        any((x[j] >= x[i] and y[j] >= y[i] and (x[j] > x[i] or y[j] > y[i])) for j in range(80)) for i in range(80)
    ]
    assert front(x, y).tolist() == [not lost for lost in beaten]


def test_the_commands_print_and_write(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(results / name / "20260101-000000") for name in "ab")
    assert main(["compare", a, b, "--out", str(tmp_path / "c")]) == 0
    told = capsys.readouterr().out
    assert "engine.moe_a2a_backend: 'all_to_all' -> 'allgather'" in told and "ttft_p50_ms" in told
    assert {p.suffix for p in (tmp_path / "c").iterdir()} == {".csv", ".png", ".svg"}
    assert main(["pareto", a, b, "--out", str(tmp_path / "p")]) == 0
    assert "points are on the front" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "p" / "pareto.csv")) == 4
    assert main(["ls", str(results)]) == 0
    told = capsys.readouterr().out
    assert told.count("DEP=4") == 3 and "smollm2-moe" in told
    assert main(["ls", str(results), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_export_keeps_every_row_and_value(results: Path, tmp_path: Path, kind: str) -> None:
    folder = results / "a" / "20260101-000000"
    assert main(["export", str(folder), "--format", kind, "--out", str(tmp_path)]) == 0
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}[kind]
    run = Run(folder)
    assert {path.stem for path in tmp_path.iterdir()} == {"sweep", "requests", "texts", "steps", "moments", "nodes"}
    requests, steps = read(tmp_path / f"requests.{kind}"), read(tmp_path / f"steps.{kind}")
    np.testing.assert_allclose(requests["first_token_s"], run.requests["first_token_s"], rtol=1e-9)
    chunks = requests["chunk_s"].iloc[0]
    chunks = json.loads(chunks) if isinstance(chunks, str) else list(chunks)
    assert chunks == pytest.approx(list(run.requests["chunk_s"].iloc[0]))
    assert len(steps) == len(run.steps)


def test_mistakes_are_said_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(tmp_path / "nowhere")]) == 2
    assert main(["ls", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["export", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "is not a folder" in told and "holds no run folder" in told
    assert "needs two runs" in told and "is not a run folder" in told
