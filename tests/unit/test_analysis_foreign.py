"""Results of other tools, in the files they write, as run folders: figures, failures, and what is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.unit.analysis_run import make_run
from toolkit import records
from toolkit.analysis import Run
from toolkit.analysis.__main__ import main
from toolkit.analysis.finish import complete_sweep
from toolkit.analysis.foreign import import_run
from toolkit.analysis.foreign.benchmarks import most_at_once
from toolkit.analysis.foreign.tensors import read_tensors
from toolkit.records.status import RunStatus, write_status
from toolkit.records.sweep import read_sweep

SUMMARY: dict[str, Any] = {
    "model_id": "deepseek-r1", "max_concurrency": 2, "duration": 4.0, "completed": 3, "total_input_tokens": 30,
    "total_output_tokens": 12, "output_throughput": 3.0, "total_token_throughput": 10.5, "mean_ttft_ms": 120.0,
    "median_ttft_ms": 110.0, "p99_ttft_ms": 200.0, "mean_tpot_ms": 50.0, "median_tpot_ms": 40.0, "p99_tpot_ms": 90.0,
}  # fmt: skip
DETAILS: dict[str, Any] = {
    "input_lens": [10, 10, 10, 7], "output_lens": [4, 4, 4, 0], "ttfts": [0.1, 0.2, 0.3, 0.0],
    "itls": [[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.1, 0.1, 0.4], []], "errors": ["", "", "", "HTTP 503"],
}  # fmt: skip


def imported(tool: str, files: list[Path], tmp_path: Path, **options: Any) -> Run:
    run = Run(import_run(tool, files, tmp_path / "results", **options))
    run.read_all()
    assert not [line for line in run.warnings if "cannot be read" in line]
    return run


def test_vllm_with_details_goes_through_our_definitions(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps(SUMMARY | DETAILS | {"start_times": [5.0, 5.0, 5.5, 5.6], "failed": 1}))
    run = imported("vllm", [path], tmp_path, gpus=2)
    row = run.sweep.iloc[0]
    assert (row["concurrency"], row["requests"], row["failed"]) == (2, 4, 1)
    assert row["ttft_p50_ms"] == pytest.approx(200)
    assert row["tpot_mean_ms"] == pytest.approx(1e3 * (0.1 + 0.2 + 0.2) / 3, rel=1e-5)
    assert row["e2e_p50_ms"] == pytest.approx(800)
    assert row["duration_s"] == pytest.approx(5.5 + 0.9 - 5.0)
    assert row["output_tok_s_per_gpu"] == pytest.approx(12 / 1.4 / 2, rel=1e-5)
    assert run.requests["error"].iloc[-1] == "HTTP 503"
    assert run.settings["model"] == "deepseek-r1"


def test_a_summary_keeps_the_tools_own_figures_and_leaves_the_rest_empty(tmp_path: Path) -> None:
    path = tmp_path / "sglang.jsonl"
    lines = [SUMMARY | {"total_throughput": 10.5, "mean_e2e_latency_ms": 500.0, "max_concurrency": c} for c in (2, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = imported("sglang", [path], tmp_path)
    assert run.sweep["concurrency"].tolist() == [2, 4]
    row = run.sweep.iloc[0]
    assert row["ttft_p99_ms"] == 200 and row["e2e_mean_ms"] == 500 and row["output_tok_s"] == 3
    assert math.isnan(row["ttft_p90_ms"]) and math.isnan(row["output_tok_s_per_gpu"]) and len(run.requests) == 0
    assert "the tool does not keep when requests were sent" in " ".join(run.manifest["notes"])
    complete_sweep(run)
    assert read_sweep(run.path)["output_tok_s"].tolist() == [3.0, 3.0]


def aiperf_line(index: int, start_s: float, **metadata: Any) -> dict[str, Any]:
    def ms(value: float) -> dict[str, Any]:
        return {"value": value, "unit": "ms"}

    return {
        "metadata": {"session_num": index, "x_request_id": f"r{index}", "request_start_ns": int(start_s * 1e9),
                     "request_end_ns": int((start_s + 0.41) * 1e9), "benchmark_phase": "profiling", **metadata},
        "metrics": {"time_to_first_token": ms(100.0), "request_latency": ms(400.0), "inter_token_latency": ms(75.0),
                    "inter_chunk_latency": {"value": [100.0, 100.0, 100.0], "unit": "ms"},
                    "output_sequence_length": {"value": 5, "unit": "tokens"},
                    "input_sequence_length": {"value": 32, "unit": "tokens"}},
        "error": None,
    }  # fmt: skip


def test_aiperf_records(tmp_path: Path) -> None:
    failed = aiperf_line(2, 100.3) | {"metrics": {}, "error": {"code": 503, "message": "overloaded"}}
    warm = aiperf_line(3, 90.0, benchmark_phase="warmup")
    lines = [aiperf_line(0, 100.0), aiperf_line(1, 100.2), failed, warm, aiperf_line(4, 101.0, was_cancelled=True)]
    path = tmp_path / "profile_export.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = imported("aiperf", [path], tmp_path)
    assert run.requests["status"].tolist() == ["ok", "ok", "error", "cancelled"]
    assert run.requests["error"].tolist()[2] == "overloaded"
    row = run.sweep.iloc[0]
    assert row["concurrency"] == 3  # 100.0, 100.2 and 100.3 overlap
    assert row["ttft_p50_ms"] == pytest.approx(100) and row["e2e_p50_ms"] == pytest.approx(400)
    assert row["tpot_p50_ms"] == pytest.approx(300 / 4)  # aiperf's inter_token_latency, again
    assert list(run.requests["chunk_tokens"].iloc[0]) == [1, 2, 1, 1]


def test_aiperf_summary(tmp_path: Path) -> None:
    path = tmp_path / "profile_export_aiperf.csv"
    path.write_text(
        "Metric,avg,min,max,sum,p1,p50,p90,p99,std\n"
        "Inter Token Latency (ms),20.00,1,2,3,4,19.00,22.00,30.00,1\n"
        "Request Latency (ms),900.00,1,2,3,4,880.00,950.00,999.00,1\n"
        "Time to First Token (ms),100.00,1,2,3,4,90.00,150.00,190.00,1\n"
        "Output Token Throughput Per User (tokens/sec/user),51.00,1,2,3,4,52.00,53.00,54.00,1\n\n"
        "Metric,Value\nBenchmark Duration (sec),10.00\nOutput Token Throughput (tokens/sec),\"1,234.00\"\n"
        "Request Count,50.00\nError Request Count,2\n"
    )  # fmt: skip
    row = imported("aiperf", [path], tmp_path, gpus=2).sweep.iloc[0]
    assert row["tpot_p90_ms"] == 22 and row["ttft_p50_ms"] == 90 and row["e2e_p99_ms"] == 999
    assert row["output_tok_s"] == 1234 and row["output_tok_s_per_gpu"] == 617 and row["requests"] == 52
    assert math.isnan(row["itl_p50_ms"])


def test_most_at_once() -> None:
    assert most_at_once([(0, 2), (1, 3), (2, 4), (2.5, 2.6)]) == 3
    assert most_at_once([]) == 0


def test_sglang_stat_dump(tmp_path: Path) -> None:
    path = tmp_path / "dump.pt"
    count = torch.arange(3 * 4 * 8).reshape(3, 4, 8)
    count[:, 0] = 0  # a dense layer
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": 0.5}, path)
    run = imported("sglang-experts", [path], tmp_path, ep_size=4)
    assert run.experts is not None and run.whole_load is not None
    assert run.experts.layer_ids.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.experts.counts, count.numpy()[:, 1:])
    assert run.whole_load.imbalance_max > 1


def test_sglang_per_pass_dump_is_laid_back_on_logical_experts(tmp_path: Path) -> None:
    path = tmp_path / "dump.pt"
    placement = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]])
    passes = [{"forward_pass_id": i, "rank": 0, "global_physical_count": torch.full((2, 6), i + 1)} for i in range(2)]
    torch.save({"records": passes, "last_physical_to_logical_map": placement}, path)
    run = imported("sglang-experts", [path], tmp_path, ep_size=3)
    assert run.experts is not None
    assert run.experts.counts.tolist() == [[[2, 2, 1, 1], [1, 1, 1, 3]], [[4, 4, 2, 2], [2, 2, 2, 6]]]
    np.testing.assert_array_equal(run.experts.placement[0], placement.numpy())


def test_tensorrt_llm_statistics_are_summed_over_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "statistic"
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    for rank in range(2):
        counts = {f"{i}_{layer}": np.full(4, i + layer + rank, np.int32) for i in (100, 101) for layer in (3, 4)}
        save_file(counts, folder / f"rank{rank}.safetensors")
    run = imported("trtllm-experts", [folder], tmp_path)
    assert run.experts is not None and run.experts.ep_size == 2
    assert run.experts.layer_ids.tolist() == [3, 4]
    assert run.experts.counts[:, :, 0].tolist() == [[207, 209], [209, 211]]


def test_a_real_dump_reads_as_torch_reads_it(shared_data: Path) -> None:
    path = shared_data / "experts" / "expert_distribution_fp4_1k1k_compressed.pt"
    ours, theirs = read_tensors(path), torch.load(path, weights_only=True)
    np.testing.assert_array_equal(ours["logical_count"], theirs["logical_count"].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bool, torch.float16])
def test_tensors_of_every_kind_and_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    data = {
        "a": value,
        "view": value[:, 1:, ::2],
        "t": value.transpose(0, 2),
        "empty": value[:0],
        "n": [1, (2.5, None)],
    }
    torch.save(data, tmp_path / "x.pt")
    read = read_tensors(tmp_path / "x.pt")
    for name in ("a", "view", "t", "empty"):
        np.testing.assert_array_equal(read[name], data[name].numpy())
    assert read["n"] == [1, (2.5, None)]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_dump_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"logical_count": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match="refused"):
        read_tensors(Path("bad.pt"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"\x80\x04."])
def test_what_is_no_dump_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is not a file of torch"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("tool", "content"),
    [("vllm", "[1, 2]"), ("vllm", '{"completed": 3}'), ("sglang", "not json"), ("aiperf", '{"metadata": {}}')],
)
def test_a_file_of_another_kind_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, tool: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    assert main(["import", tool, str(path), "--results", str(tmp_path / "results")]) == 2
    assert f"result.json is not a result of {tool}" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_an_ep_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.ones(1, 2, 6)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"ep_size=4 does not divide 6 slots .* give --ep-size"):
        import_run("sglang-experts", [tmp_path / "x.pt"], tmp_path / "results", ep_size=4)


def test_what_is_written_as_vllm_is_read_back_as_the_same_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "results")
    assert main(["export", str(folder), "--format", "vllm", "--out", str(tmp_path / "out")]) == 0
    ours = Run(folder)
    files = [tmp_path / "out" / f"results_concurrency_{c}_gpus_{ours.num_gpus}.json" for c in ours.sweep["concurrency"]]
    theirs = imported("vllm", files, tmp_path, gpus=ours.num_gpus)
    same = ["concurrency", "requests", "failed", "duration_s", "isl_mean", "osl_mean", "output_tok_s", "total_tok_s"]
    same += [f"{name}_{stat}_ms" for name in ("ttft", "tpot", "e2e", "icl") for stat in ("mean", "p50", "p99")]
    assert theirs.sweep[same].to_numpy() == pytest.approx(ours.sweep[same].to_numpy(), rel=1e-5)
    summary = json.loads(files[0].read_text())
    row = ours.sweep.iloc[0]
    assert summary["mean_itl_ms"] == pytest.approx(row["icl_mean_ms"], rel=1e-5), "vLLM's ITL counts chunks"
    assert summary["median_e2el_ms"] == pytest.approx(row["e2e_p50_ms"], rel=1e-5)


def test_what_is_written_as_aiperf_has_its_names_and_units(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "results")
    assert main(["export", str(folder), "--format", "aiperf"]) == 0
    run = Run(folder)
    row = run.sweep.iloc[-1]
    path = folder / "export" / f"concurrency_{row['concurrency']:g}" / "profile_export_aiperf.json"
    found = json.loads(path.read_text())
    assert found["inter_token_latency"]["unit"] == "ms"
    assert found["inter_token_latency"]["p50"] == pytest.approx(row["tpot_p50_ms"], rel=1e-5), (
        "aiperf's ITL is our TPOT"
    )
    assert found["inter_chunk_latency"]["p99"] == pytest.approx(row["icl_p99_ms"], rel=1e-5)
    assert found["time_to_first_token"]["count"] == row["requests"] - row["failed"]
    assert found["request_throughput"] == {"unit": "requests/sec", "avg": pytest.approx(
        (row["requests"] - row["failed"]) / row["duration_s"], rel=1e-5)}  # fmt: skip
    assert found["output_token_throughput"]["avg"] == pytest.approx(row["output_tok_s"], rel=1e-5)
    assert found["output_token_throughput_per_user"]["avg"] == pytest.approx(row["output_tok_s_per_user"], rel=1e-5)


def test_a_run_without_answers_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records.new_run_folder(tmp_path, "empty")
    write_status(folder, RunStatus("failed", "no server"))
    assert main(["export", str(folder), "--format", "vllm"]) == 2
    assert "holds no request that ended well" in capsys.readouterr().err
