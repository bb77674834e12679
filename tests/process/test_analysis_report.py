"""A run folder, whole or damaged, to charts, report and terminal table."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.unit.analysis_run import EPOCH, failure, make_run, record
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.__main__ import main
from toolkit.analysis.charts import CHARTS
from toolkit.analysis.findings import best_row, verdict
from toolkit.analysis.finish import complete_sweep, finish_run, terminal_table
from toolkit.analysis.report import write_report
from toolkit.analysis.sweep_row import sweep_row
from toolkit.analysis.trust import warnings
from toolkit.records.experts import read_experts, write_experts
from toolkit.records.requests import RequestRecord, read_requests, write_requests
from toolkit.records.status import PointStatus, RunStatus, write_status
from toolkit.records.sweep import SWEEP_COLUMNS, SWEEP_TEXTS, read_sweep, write_sweep

CHART_NAMES = {
    "nodes",
    "latency_vs_concurrency", "latency_distributions", "throughput_vs_latency", "goodput_vs_load", "timeline",
    "imbalance_vs_latency", "expert_load_heatmap", "rank_imbalance", "balancedness_over_time", "co_activation",
    "cross_node_traffic",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ``finish_run`` was applied to once; not to be changed."""
    folder = make_run(tmp_path_factory.mktemp("results"))
    (folder / "table.txt").write_text(finish_run(folder), encoding="utf-8")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path, points=(1, 4), requests_per_slot=2)


def report_without_charts(folder: Path) -> tuple[str, str]:
    """The terminal table and the page, without the drawing, which takes most of the time."""
    run = Run(folder)
    complete_sweep(run)
    return terminal_table(run), write_report(run, []).read_text(encoding="utf-8")


def reasons(page: str) -> dict[str, str]:
    return dict(re.findall(r"<strong>(\w+)</strong> was not drawn: ([^<]*)<", page))


class Links(HTMLParser):
    """Collects every address and script of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


WHERE_ASKED = {"rebalances", "against", "balance_against", "handoffs"}  # of what most runs do not do
NO_DATA = {"server_metrics"}  # the run of these tests kept none


def test_every_chart_of_the_contract_is_drawn_and_not_blank(finished: Path) -> None:
    assert set(CHARTS) == CHART_NAMES | WHERE_ASKED | NO_DATA
    files = {path.name for path in (finished / records.CHARTS).iterdir()}
    assert files == {f"{name}.{kind}" for name in CHART_NAMES for kind in ("png", "svg")}
    for name in CHART_NAMES:
        assert " ".join(CHARTS[name].caption.split()[:3]) in (finished / records.CHARTS / f"{name}.svg").read_text()
    for path in (finished / records.CHARTS).glob("*.png"):
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 400, path
        coloured = np.ptp(pixels[..., :3], axis=-1) > 0.3  # text, axes and grid are grey
        assert coloured.sum() > 500, path


def test_the_report_stands_alone(finished: Path) -> None:
    page = (finished / records.REPORT).read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert len(links.addresses) == len(CHART_NAMES)
    assert all(address.startswith("data:image/png;base64,") for address in links.addresses)
    assert not links.tags & {"script", "link", "iframe"}
    assert "http://" not in page and "https://" not in page and "url(" not in page
    assert set(reasons(page)) == NO_DATA


def test_the_sweep_gets_its_expert_figures_and_keeps_the_rest(finished: Path) -> None:
    run, sweep = Run(finished), read_sweep(finished)
    for (_, row), point, load in zip(sweep.iterrows(), run.points, run.point_loads, strict=True):
        assert load is not None
        expected = sweep_row(point.requests, point.concurrency, 4, load.balancedness_mean, load.imbalance_max)
        power = ("power_w", "output_tok_s_per_w")  # from nodes.parquet
        figures = {name: value for name, value in expected.items() if name not in (*SWEEP_TEXTS, *power)}
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-5, nan_ok=True)
    assert (sweep["imbalance_max"] > 1.2).all()
    assert (sweep["output_tok_s_per_w"] * sweep["power_w"]).to_numpy() == pytest.approx(
        sweep["output_tok_s"].to_numpy(), rel=1e-4
    )


def test_finishing_twice_gives_the_same_files(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "smoke" / finished.name
    shutil.copytree(finished, copy)
    assert finish_run(copy) == (finished / "table.txt").read_text(encoding="utf-8")
    for name in (records.SWEEP, records.REPORT):
        assert (copy / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_verdict_names_the_best_point_and_the_limit(finished: Path) -> None:
    run = Run(finished)
    said = {finding.label: finding.text for finding in verdict(run)}
    assert "at concurrency 8" in said["Best point"]
    assert said["Limit"].startswith("Not reached: from concurrency 4 to 8 throughput rose")
    assert "in decoding" in said["Latency"]
    assert "Balancedness 0.6" in said["Experts"]


def test_the_best_point_is_the_lowest_load_near_the_top(finished: Path) -> None:
    run = Run(finished)
    run.sweep["output_tok_s"] = [50.0, 99.0, 100.0, 97.5]
    run.sweep["steady_output_tok_s"] = [50.0, 150.0, 100.0, 97.5]
    assert best_row(run) == 1
    said = {finding.label: finding.text for finding in verdict(run)}
    assert said["Best point"].endswith("Without start and tail of the point it delivers 150 tok/s.")
    assert said["Limit"].startswith("Saturated: from concurrency 2 to 4 throughput rose by 1%")


def test_warnings_count_failures_and_short_answers(tmp_path: Path) -> None:
    rows = [record(request_id=str(i), t_send=EPOCH + i) for i in range(120)]
    rows[3].output_tokens, rows[3].chunk_tokens = 2, [1, 1, 0]
    rows[4].chunk_tokens = [1, 1, 1]
    write_requests(tmp_path, [*rows, failure(), failure(error="timeout"), failure()])
    found = warnings(Run(tmp_path))
    assert "concurrency 1: 3 of 123 requests failed (3 error); most often: HTTP 503: overloaded" in found
    assert any("1 of 120 answers are not as long as asked (mean 2.00 of 5.00 tokens)" in line for line in found)
    assert any("1 answers whose chunks do not add up" in line for line in found)
    assert not any("p99" in line for line in found)
    assert any(line.startswith("missing: ") and records.EXPERTS in line for line in found)


def test_what_a_run_says_is_escaped(run_folder: Path) -> None:
    reason = "<script>alert(1)</script> & more"
    write_status(run_folder, RunStatus("failed", reason, [PointStatus(4, "failed", "<b>rank 2</b>")]))
    _, page = report_without_charts(run_folder)
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_what_cannot_be_drawn_says_why_and_the_rest_is_drawn_even_under_a_strange_name(run_folder: Path) -> None:
    (run_folder / records.EXPERTS).unlink()
    (run_folder / records.REQUESTS).write_bytes(b"PAR1")
    stale = run_folder / records.CHARTS / "rank_imbalance.png"
    stale.write_bytes(b"of an earlier call")
    before = (run_folder / records.SWEEP).read_bytes()
    folder = run_folder.rename(run_folder.parent / r"$\frac{$ <x>")  # neither a formula nor markup
    finish_run(folder)
    why = reasons((folder / records.REPORT).read_text(encoding="utf-8"))
    kept = {"latency_vs_concurrency", "throughput_vs_latency", "nodes"}
    assert set(why) == (CHART_NAMES | NO_DATA) - kept
    assert "no expert counts" in why["rank_imbalance"]
    assert {path.stem for path in (folder / records.CHARTS).iterdir()} == CHART_NAMES - set(why)
    assert (folder / records.SWEEP).read_bytes() == before


@pytest.mark.parametrize("name", [records.REQUESTS, records.EXPERTS, records.SWEEP, records.STATUS, records.MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_broken_part_is_reported_and_costs_no_other(run_folder: Path, name: str, damage: str) -> None:
    whole = (run_folder / name).read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "garbage": b"\x80\x04garbage,\xff\n", "empty": b""}[damage]
    (run_folder / name).write_bytes(broken)
    table, page = report_without_charts(run_folder)
    assert f"{name} cannot be read" in page
    assert "Best point" in table
    if name != records.SWEEP:
        assert (run_folder / name).read_bytes() == broken


def test_a_lost_sweep_is_computed_from_the_requests(run_folder: Path) -> None:
    before = read_sweep(run_folder)
    (run_folder / records.SWEEP).unlink()
    complete_sweep(Run(run_folder))
    after = read_sweep(run_folder)
    filled_in = ("balancedness_mean", "imbalance_max", "power_w", "output_tok_s_per_w", *SWEEP_TEXTS)
    columns = [name for name in SWEEP_COLUMNS if name not in filled_in]
    np.testing.assert_allclose(after[columns], before[columns], rtol=1e-5)
    assert after["balancedness_mean"].notna().all()


def test_a_run_that_failed_before_its_first_request(tmp_path: Path) -> None:
    folder = records.new_run_folder(tmp_path, "smoke")
    points = [PointStatus(1, "pending")]
    write_status(folder, RunStatus("failed", "rank 2 ended with exit code -9", points))
    table = finish_run(folder)
    assert "Run failed: rank 2 ended with exit code -9" in table
    assert "No load point has a request that succeeded" in table
    page = (folder / records.REPORT).read_text(encoding="utf-8")
    assert set(reasons(page)) == CHART_NAMES | NO_DATA
    assert "No load point was finished" in page
    assert not (folder / records.SWEEP).exists()


def test_a_point_where_every_request_failed_leaves_nan_not_a_crash(run_folder: Path) -> None:
    rows = [failure(point=2, concurrency=8, t_send=EPOCH + 50 + i) for i in range(3)]
    sweep = read_sweep(run_folder).astype(object).to_dict("records")
    requests = [*_read_records(run_folder), *rows]
    write_requests(run_folder, requests)
    frame = read_requests(run_folder)
    write_sweep(run_folder, [*sweep, sweep_row(frame[frame["point"] == 2], 8, 4)])
    table, _ = report_without_charts(run_folder)
    assert re.search(r"8 +3 +3 +–", table)
    latency = CHARTS["latency_vs_concurrency"].draw(Run(run_folder))
    assert [len(line.get_xdata()) for line in latency.axes[0].lines] == [2, 2, 2]


def test_cancelled_requests_have_a_column_where_there_are_any(run_folder: Path) -> None:
    assert ">cancelled<" not in report_without_charts(run_folder)[1]
    rows = [failure(point=2, concurrency=8, t_send=EPOCH + 50 + i, status="cancelled") for i in range(7)]
    write_requests(run_folder, [*_read_records(run_folder), *rows, record(point=2, concurrency=8, t_send=EPOCH + 49)])
    table, page = report_without_charts(run_folder)
    assert re.search(r"8 +8 +0 +7 +100", table)
    assert "…" not in table
    assert ">cancelled<" in page
    assert not re.search(r"concurrency 8: \d+ of \d+ requests failed", page)


def test_counts_outside_the_load_leave_the_figures_empty(run_folder: Path) -> None:
    experts = read_experts(run_folder / records.EXPERTS)
    write_experts(run_folder / records.EXPERTS, dataclasses.replace(experts, times=experts.times - 1e6))
    run = Run(run_folder)
    complete_sweep(run)
    assert read_sweep(run_folder)["imbalance_max"].isna().all()
    assert any("no recorder window overlaps" in line for line in warnings(run))


def test_repeated_concurrencies_keep_their_own_requests(tmp_path: Path) -> None:
    folder = make_run(tmp_path, points=(2, 2), requests_per_slot=2)
    first, second = Run(folder).points
    assert set(first.requests["point"]) == {0} and set(second.requests["point"]) == {1}


def test_nothing_is_unpickled(run_folder: Path) -> None:
    harmful = np.array([print], dtype=object)
    np.savez(run_folder / records.EXPERTS, counts=harmful)
    run = Run(run_folder)
    assert run.experts is None
    assert any("cannot be read" in line for line in run.warnings)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records.new_run_folder(tmp_path, "smoke")
    write_status(folder, RunStatus("cancelled", "interrupted"))
    assert main(["report", str(folder), str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert f"report: {folder}/report.html" in told.out and "Run cancelled: interrupted" in told.out
    assert f"run={tmp_path} is not a run folder" in told.err
    assert main(["report", str(tmp_path / "smoke" / "latest")]) == 0


def test_metrics_alone_import_no_heavy_library() -> None:
    code = (
        "import sys, toolkit.analysis.metrics\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'jinja2', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _read_records(folder: Path) -> list[RequestRecord]:
    rows = read_requests(folder).to_dict("records")
    return [RequestRecord(**{str(k): v for k, v in row.items()}) for row in rows]
