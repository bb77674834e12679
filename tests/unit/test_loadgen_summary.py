"""What is shown at the end of a sweep, and the help of the commands beside it."""

from __future__ import annotations

import pytest

from toolkit.loadgen.__main__ import main
from toolkit.loadgen.openai_api import server_of
from toolkit.loadgen.proof import VERDICTS, Evidence, judge
from toolkit.loadgen.summary import COLUMNS, render
from toolkit.records.status import PointStatus, RunStatus


def test_a_point_is_called_what_was_asked_for_and_told_once_why_it_is_bad() -> None:
    poor = judge([Evidence(in_flight_s=80.0, asked_s=100.0, token_chunks=1000)], "socket", 1)
    fair = judge([Evidence(clock_steps=1)], "socket", 1)
    points = [
        PointStatus(3, "done", request_rate=2.5, client=fair),
        PointStatus(8, "invalid", f"{VERDICTS[poor.verdict]}: {poor.reasons[0]}", client=poor),
    ]
    rows = [dict.fromkeys(COLUMNS.values(), 1.0) | {"state": point.state} for point in points]
    shown = render(rows, RunStatus("failed", points=points))
    assert "2.5 requests/s: degraded: the load generator may have moved these figures" in shown
    assert "the system clock was set 1 times meanwhile" in shown
    assert shown.count("concurrency 8: invalid: the load generator was the limit") == 1
    assert shown.count("20.0% of the concurrency") == 1
    cells = [line.split() for line in shown.splitlines()]
    assert [line[-2:] for line in cells if line[-1:] in (["done"], ["invalid"])] == [
        ["degraded", "done"], ["client_limited", "invalid"],
    ], "nothing is cut off"  # fmt: skip


@pytest.mark.parametrize(
    ("command", "says"), [("selfcheck", "exact schedule"), ("join", "HOST:PORT is what the leader")]
)
def test_each_command_has_its_own_help(command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions"])
def test_any_address_of_a_server_will_do(path: str) -> None:
    assert server_of(f"http://node7:8000/prefix{path}") == "http://node7:8000/prefix"
