"""The rate match: runs whose rates are known by construction, of each phase, lengths and bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.unit.analysis_run import EPOCH, record
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.__main__ import main
from toolkit.analysis.goodput import Slo
from toolkit.analysis.rates import full_gap_s, rate_match
from toolkit.analysis.report import _subtitle
from toolkit.records.files import write_json
from toolkit.records.requests import RequestRecord, requests_table, write_requests

PLAN = {
    "mapping": "1 prefill TP=2 + 1 decode TP=4", "num_gpus": 6,
    "workers": [{"pool": "prefill", "ranks": [{}] * 2}, {"pool": "decode", "ranks": [{}] * 4}],
}  # fmt: skip


def write(folder: Path, phase: str, rows: list[RequestRecord]) -> Run:
    folder.mkdir(parents=True)
    write_requests(folder, rows)
    config = {"model": {"name": "m"}, "load": {"phase": phase}}
    (folder / records.CONFIG).write_text(yaml.safe_dump(config))
    write_json(folder / records.PLAN, PLAN)
    return Run(folder)


def test_a_page_names_both_pools(tmp_path: Path) -> None:
    run = prefill_run(tmp_path / "prefill", 128, {1: 10.0})
    assert str(PLAN["mapping"]) in _subtitle(run)


def prefill_run(folder: Path, isl: int, per_s: dict[int, float]) -> Run:
    """Of each concurrency, so many prompts a second; TTFT is concurrency / rate (Little's law)."""
    rows, begin = [], EPOCH
    for point, (concurrency, rate) in enumerate(per_s.items()):
        for i in range(40):
            ttft = concurrency / rate
            rows.append(answer(point, concurrency, f"p{point}-{i}", begin + i / rate, isl, ttft, 0.0, 1))
        begin += 100
    return write(folder, "prefill", rows)


def decode_run(folder: Path, isl: int, osl: int, gap_s: dict[int, float]) -> Run:
    """Of each concurrency, a batch whose requests come one after the other and then take a token every ``gap_s``."""
    rows, begin = [], EPOCH
    for point, (concurrency, gap) in enumerate(gap_s.items()):
        for i in range(concurrency):
            rows.append(answer(point, concurrency, f"d{point}-{i}", begin + 0.01 * i, isl, 0.05, gap, osl))
        begin += 100
    return write(folder, "decode", rows)


def answer(
    point: int, concurrency: int, rid: str, at: float, isl: int, ttft: float, gap: float, osl: int
) -> RequestRecord:
    times = (ttft + gap * np.arange(osl)).tolist()
    changes: dict[str, Any] = {
        "point": point, "concurrency": concurrency, "request_id": rid, "t_send": at, "prompt_tokens": isl,
        "first_byte_s": ttft, "first_token_s": ttft, "first_visible_s": ttft, "last_token_s": times[-1],
        "end_s": times[-1], "output_tokens": osl, "expected_output_tokens": osl, "chunk_s": times,
        "chunk_tokens": [1] * osl,
    }  # fmt: skip
    return record(**changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("rates")
    return {
        "p1000": prefill_run(root / "a" / "1", 1000, {4: 20.0, 16: 30.0}),
        "p4000": prefill_run(root / "b" / "1", 4000, {4: 6.0}),
        "d1000": decode_run(root / "c" / "1", 1000, 100, {8: 0.02, 32: 0.04}),
        "d4000": decode_run(root / "d" / "1", 4000, 100, {8: 0.03}),
    }


def test_decode_gpus_of_a_prefill_gpu_are_the_ratio_of_their_rates(runs: dict[str, Run]) -> None:
    table = rate_match(list(runs.values()), Slo())
    # 40 prompts, the last of which ends its TTFT after the others: 40 / (39 / 30 + 16 / 30) a second on 2 GPUs
    prefill = 40 / (39 / 30 + 16 / 30) / 2
    decode = {8: 8 / 0.02 / 100 / 4, 32: 32 / 0.04 / 100 / 4}  # answers a second and GPU, 4 of them
    rows = table[table["isl"] == 1000].set_index("concurrency")
    for concurrency, rate in decode.items():
        assert rows.loc[concurrency, "decode_gpus"] == pytest.approx(prefill / rate, rel=1e-3)
    assert rows["tpot_ms"].tolist() == pytest.approx([20, 40], rel=1e-3)
    assert rows["chosen"].tolist() == [False, True], "the larger batch gives more tokens a GPU"
    assert set(table["isl"]) == {1000, 4000} and table["chosen"].sum() == 2


def test_bounds_choose_the_points(runs: dict[str, Run]) -> None:
    table = rate_match(list(runs.values()), Slo(ttft_ms=300, tpot_ms=25))
    rows = table[table["isl"] == 1000].set_index("concurrency")
    assert rows["prefill_concurrency"].unique().tolist() == [4], "at 16 the first token takes 533 ms"
    assert rows["keeps"].tolist() == [True, False] and rows["chosen"].tolist() == [True, False]
    assert not (table["isl"] == 4000).any(), "no prefill point of 4,000 tokens keeps 300 ms"


def test_runs_of_one_phase_or_of_other_lengths_are_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(ValueError, match=r"none of the 1 runs has load\.phase=decode"):
        rate_match([runs["p1000"]], Slo())
    with pytest.raises(ValueError, match=r"decode has m at 4000 tokens, prefill m at 1000 tokens"):
        rate_match([runs["p1000"], runs["d4000"]], Slo())


def test_a_batch_that_was_never_full_has_no_figure(runs: dict[str, Run]) -> None:
    rows = [answer(0, 2, f"r{i}", EPOCH + 10 * i, 10, 0.1, 0.02, 20) for i in range(2)]  # one after the other
    frame = requests_table(rows).to_pandas(types_mapper=pd.ArrowDtype)
    assert np.isnan(full_gap_s(frame))


def test_the_command_prints_a_table_and_draws(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(run.path) for run in runs.values()]
    assert main(["rates", *paths, "--tpot-ms", "35", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "too slow" in out and out.count("choose") == 2
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    assert len(pd.read_csv(tmp_path / "rates.csv")) == 3
    assert main(["rates", paths[0], "--out", str(tmp_path)]) == 2
    assert "load.phase=decode" in capsys.readouterr().err
