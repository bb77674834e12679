"""The exact-schedule server and the figures of the load generator against its log; the verdict on the client itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from toolkit.loadgen import exact
from toolkit.loadgen.compiled import build
from toolkit.loadgen.proof import Evidence, Histogram, in_flight, judge
from toolkit.loadgen.selfcheck import Case, ceiling, main, render, run_case


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("transport", ["socket", "aiohttp"])
def test_reported_figures_are_the_servers(compiled: bool, transport: str) -> None:
    if compiled and build(exact.SOURCE) is None:
        pytest.skip("no C compiler")
    case = Case(4, exact.Schedule(ttft_ms=30, itl_ms=20), tokens=10)
    outcome = asyncio.run(run_case(case, transport, pin=False, compiled=compiled))
    assert (outcome.requests, outcome.failed) == (12, 0)
    assert outcome.proof.transport == transport
    assert outcome.proof.length_mismatches == outcome.proof.token_count_mismatches == 0
    assert outcome.ttft_p50_error_ms > -1, "nothing is seen before it was sent"
    if transport == "socket":  # the kernel's stamps do not depend on how busy the machine is
        assert abs(outcome.e2e_p99_error_ms) < 5
        assert outcome.proof.connections_opened == 0, "they are opened before the window"
    assert "4 x 20 ms" in render([outcome], "title")


def test_every_process_has_a_server_of_its_own() -> None:
    case = Case(3, exact.Schedule(ttft_ms=30, itl_ms=20), tokens=5)
    outcome = asyncio.run(run_case(case, "socket", workers=2, pin=False))
    assert (outcome.requests, outcome.failed, outcome.proof.workers) == (18, 0, 2)
    assert outcome.ttft_p50_error_ms > -1
    assert "6 x 20 ms" in render([outcome], "title")


def test_the_log_is_what_was_sent() -> None:
    import urllib.request

    schedule = exact.Schedule(ttft_ms=10, itl_ms=5, grid_ms=50)
    with exact.running(schedule) as server:
        request = urllib.request.Request(f"{server.url}/v1/chat/completions", b'{"max_tokens":4}')
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
    assert text.count('"content":" tok') == 4
    assert text.endswith("data: [DONE]\n\n")
    assert [len(sent) for sent in server.truth.sent] == [4]
    sent = server.truth.sent[0]
    assert (np.diff(sent) > 0).all()
    assert sent[0] > server.truth.arrived[0]
    assert (sent // 50_000_000 - sent[0] // 50_000_000 >= [0, 1, 2, 3]).all(), "each on its own multiple of the grid"
    assert len(server.truth.after(1).sent) == 0


def test_a_log_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "truth"
    np.array([1, 3, 5, 6], "<i8").tofile(path)
    with pytest.raises(ValueError, match="ends in the middle"):
        exact.read_truth(path)


def test_selfcheck_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transport=quic"]) == 2
    assert main(["streams=3"]) == 2
    assert "selfcheck takes" in capsys.readouterr().err
    assert "too slow or too busy" in ceiling([])


def test_histograms_add_up() -> None:
    rng = np.random.default_rng(0)
    values = (rng.lognormal(12, 1, 20_000)).astype(np.int64)
    one, other = Histogram(), Histogram()
    one.add(values[:5000])
    other.add(values[5000:])
    one.merge(other)
    for percent in (50, 99):
        assert one.percentile_ms(percent) == pytest.approx(np.percentile(values, percent) * 1e-6, rel=0.06)
    assert one.max_ns == values.max()
    assert Histogram().percentile_ms(99) == 0
    one.add(np.array([-5, 0]))  # the clock may have been set between two stamps


def test_requests_in_flight_between_two_moments() -> None:
    s = 10**9
    assert in_flight([0, 2 * s], [3 * s, 9 * s], 1 * s, 5 * s, 2) == (5.0, 8.0)
    assert in_flight([], [], 0, s, 2) == (0, 0)
    assert in_flight([0], [s], s, s, 1) == (0, 0), "no time in which all slots were in use"


@pytest.mark.parametrize(
    ("seen", "verdict", "reason"),
    [
        ({}, "ok", ""),
        ({"in_flight_s": 99.0}, "ok", ""),
        ({"in_flight_s": 95.0}, "degraded", "5.0% of the concurrency"),
        ({"in_flight_s": 80.0}, "client_limited", "20.0% of the concurrency"),
        ({"coalesced_chunks": 500}, "ok", ""),  # read at once: the server or the network sent them together
        ({"coalesced_chunks": 500, "blurred_chunks": 20}, "degraded", "2.0% of the chunks"),
        ({"coalesced_chunks": 500, "blurred_chunks": 100}, "client_limited", "10.0% of the chunks"),
        ({"cpu_share": 0.99}, "ok", ""),  # busy, but nothing was late for it
        ({"cpu_share": 0.99, "blurred_chunks": 1}, "client_limited", "busy for 99%"),
        ({"clock_steps": 2}, "degraded", "the system clock was set 2 times"),
    ],
)
def test_the_verdict(seen: dict[str, float], verdict: str, reason: str) -> None:
    values = {"in_flight_s": 100.0, "asked_s": 100.0, "token_chunks": 1000, "output_tokens": 1000, "cpu_s": 0.01} | seen
    proof = judge([Evidence(**values)], "socket", 1)  # type: ignore[arg-type]
    assert proof.verdict == verdict
    assert reason in "; ".join(proof.reasons)
    assert bool(proof.reasons) == (verdict != "ok")
    assert proof.cpu_ms_per_1000_tokens == pytest.approx(10)


def test_late_sends_and_late_reads_without_stamps_count() -> None:
    late = Evidence(token_chunks=10)
    late.schedule_lag.add(np.full(100, 80_000_000))
    assert judge([late], "socket", 1).verdict == "client_limited"
    unstamped = Evidence(token_chunks=10, unstamped=1)
    unstamped.lag.add(np.full(100, 8_000_000))
    assert judge([unstamped], "socket", 1).verdict == "degraded"
    assert judge([Evidence(cpu_share=0.5), Evidence(cpu_share=0.2)], "socket", 2).cpu_share == 0.5
