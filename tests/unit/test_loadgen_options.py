"""The command line: values, mistakes, help; and the progress display."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.load import LoadConfig
from toolkit.loadgen.__main__ import main
from toolkit.loadgen.options import Options, check_load, parse
from toolkit.loadgen.progress import ProgressBars, ProgressFile


def test_values_are_yaml_or_json() -> None:
    options = parse(
        ["concurrency=[1, 8]", 'dataset="random"', "temperature=1e-1", "ignore_eos=no", "model=123", "num-gpus=2"]
    )
    assert (options.concurrency, options.dataset, options.temperature) == ([1, 8], "random", 0.1)
    assert (options.ignore_eos, options.model, options.num_gpus) == (False, "123", 2)
    assert parse(["concurrency=4"]).concurrency == [4]
    assert parse(["model=a: b", "--osl=7"]) == Options(model="a: b", osl=7)
    assert parse(["api_key_env=", "tokenizer=''"]) == Options()


def test_every_key_of_the_experiments_load_is_an_option() -> None:
    """As the launcher passes them: key=json."""
    values = dataclasses.asdict(LoadConfig(concurrency=[3], osl=9, endpoint="completions", record_text=False))
    options = parse([f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert {key: getattr(options, key) for key in values} == values


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("concurency=1", "concurency is not a config key; did you mean concurrency?"),
        ("osl", "osl is not of the form key=value; --help lists the keys"),
        ("endpoint=chats", "endpoint='chats': Invalid enum value 'chats'; use one of: chat, completions"),
        ("osl=abc", "osl='abc': Expected `int`, got `str`; use a whole number"),
        ("concurrency=1,2", "concurrency='1,2': Expected `array`, got `str`; use a list such as [1,2,4]"),
        ("concurrency=[]", "concurrency=[] names no load point; use a list such as [1,2,4]"),
        ("concurrency=[2,0]", "concurrency=[2, 0] has a value below 1; use values of at least 1"),
        (
            "request_rate=0.0",
            "request_rate=[0.0] has a value that is not above 0; use requests a second such as [0.5,2,8]",
        ),
        ("request_rate=x", "request_rate='x': Expected `array`, got `str`; use a list such as [0.5,2]"),
        ("dataset=azure", "dataset=azure needs a file; give dataset_path"),
        ("extra_body={seed: 1}", "extra_body has seed, which the load generator sets: say seed= instead"),
        ("extra_body=[1]", "extra_body=[1]: Expected `object`, got `array`; use a mapping such as '{name: value}'"),
        ("headers={Authorization: x}", "headers has Authorization, which the load generator sets: leave it out"),
        (
            'headers={"X-A": "b\\r\\nX-B: c"}',
            "headers has 'X-A': a header is a name and one line of ASCII; write it so",
        ),
        (
            "arrival=trace",
            "arrival=trace needs a dataset that says when; dataset=prompts does not, "  # noqa: ISC004
            "use mooncake, azure, burstgpt, trace",
        ),
        ("search=true", "search=true needs an objective: give slo_ttft_ms, slo_tpot_ms or slo_e2e_ms"),
        ("num_requests=-1", "num_requests=-1 is negative; use 0 to derive it from concurrency, or a number"),
        ("timeout_s=NaN", "timeout_s=nan must be more than 0 seconds"),
        (
            "dataset=promts",
            "dataset=promts is not known; use one of: azure, burstgpt, mooncake, prompts, random, sharegpt, trace",
        ),
        ("dataset_path=nofile", "dataset_path=nofile is not a file; give one, or leave it empty"),
        ("url=localhost:80", "url=localhost:80 is not an HTTP address; use for example http://127.0.0.1:8000"),
        ("num_gpus=0", "num_gpus=0 must be at least 1"),
        ("progress=no/such/file", "progress=no/such/file: its folder does not exist; make it first"),
        (
            "api_key_env=NO_SUCH_VARIABLE",
            "api_key_env=NO_SUCH_VARIABLE is not set in the environment; export it, or leave it empty",
        ),
    ],
)
def test_mistakes_are_explained(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err == message + "\n"


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ValueError, match=r"osl=0 .*\n.*isl|isl=0 .*\nosl=0"):
        parse(["osl=0", "isl=0"])
    with pytest.raises(ValueError, match="osl is given twice"):
        parse(["osl=1", "osl=2"])
    assert check_load(LoadConfig()) == []


def test_help_names_every_option_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from toolkit.loadgen.__main__ import main; main(['--help'])\n"
        "print(sorted({'torch', 'pandas', 'aiohttp', 'transformers', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for field in dataclasses.fields(Options):
        assert f"  {field.name}=" in done.stdout
        assert field.metadata["help"] in done.stdout


def state(**change: Any) -> dict[str, Any]:
    return {
        "points": 2, "point": 0, "concurrency": 4, "request_rate": 0.0, "phase": "measure", "done": 3, "total": 12,
        "failed": 1,
        "output_tok_s": 12.34, "latencies": {}, "elapsed_s": 5.0, **change,
    }  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    screen = Terminal()
    with ProgressBars(screen) as bars:
        bars.update(state())
        bars.update(state(phase="done", latencies={"ttft": 310.4, "tpot": 20.6}))
        bars.update(state(point=1, concurrency=8, done=2, total=20, failed=0))
    last = screen.getvalue().split("[1/2]")[-1]
    assert "12/12" in last, "a point that was passed over is complete"
    assert "1 failed" in last
    assert "TTFT 310 ms, TPOT 21 ms" in last
    assert "concurrency 8" in last
    assert "2/20" in last


def test_what_was_cancelled_is_shown_beside_what_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    caplog.set_level(logging.INFO)
    screen = Terminal()
    for stream in (screen, io.StringIO()):
        with ProgressBars(stream) as bars:
            bars.update(state(cancelled=2))
    assert "2 cancelled" in screen.getvalue() and "1 failed" in screen.getvalue()
    assert "1 failed, 2 cancelled, 12.3 tok/s" in caplog.text


def test_lines_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBars(io.StringIO()) as bars:
        for done in range(5):
            bars.update(state(done=done))
        for _ in range(2):
            bars.update(state(done=12, phase="done", latencies={"ttft": 310.4}))
    assert len(caplog.messages) == 2, "not a line for every update"
    assert (
        caplog.messages[1] == "point 1/2, concurrency 4, done: 12/12 requests, 1 failed, 12.3 tok/s, 5 s, TTFT 310 ms"
    )


def test_a_rate_is_shown_as_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBars(io.StringIO()) as bars:
        bars.update(state(request_rate=2.5))
        bars.update(state(point=1, request_rate=-1.0))
    assert "point 1/2, 2.5 requests/s, measure" in caplog.messages[0]
    assert "point 2/2, trace, measure" in caplog.messages[1]


def test_the_file_is_whole_and_ends_with_the_last_state(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    with ProgressFile(path) as file:
        file.update(state(done=1))
        assert json.loads(path.read_text())["done"] == 1
        for done in range(2, 10):
            file.update(state(done=done))
        assert json.loads(path.read_text())["done"] < 9, "at most four times a second"
    assert json.loads(path.read_text()) == state(done=9)
    assert [p.name for p in tmp_path.iterdir()] == ["progress.json"]
