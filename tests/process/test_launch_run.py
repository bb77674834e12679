"""A whole run, with small stand-ins for the engine's processes: readiness, failure, cancellation, what is left."""

from __future__ import annotations

import http.server
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tests.process.leftovers import none_left
from tests.unit.launch_experiment import experiment
from tests.unit.loadgen_server import ScriptedServer, tokens
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping, to_mapping
from toolkit.launch import deployment, load, ports, run
from toolkit.launch.adapters import Processes
from toolkit.launch.check import check
from toolkit.launch.health import LoadingBars, RankProgress, wait_ready
from toolkit.launch.interrupts import Interrupts
from toolkit.launch.launcher import Node, ProcessSpec
from toolkit.launch.local import LocalLauncher
from toolkit.launch.plan import DeploymentPlan, plan
from toolkit.launch.watch import RunFailed, Watch
from toolkit.records.status import read_status
from toolkit.registry import Registry

FRONTEND = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({answer}).encode()
        self.send_response({status})
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        print("POST", self.path, self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response({flush})
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
LOADING = {"state": "loading", "ranks": [{"rank": 0, "stage": "load", "done": 3, "total": 10}]}
SLEEP = "import time; time.sleep(600)"


def deploy(monkeypatch: pytest.MonkeyPatch, status: int, answer: object, rank: str, flush: int = 200) -> None:
    """Puts in the engine's place a frontend that always gives ``answer``, and one rank that runs ``rank``.

    ``flush``: the status with which it answers what is asked of it by POST.
    """
    code = FRONTEND.format(status=status, answer=answer, flush=flush)

    def processes(plan: DeploymentPlan, cfg: ExpConfig, hosts: Sequence[str], run_dir: Path) -> Processes:
        port = str(plan.frontend.http_port)
        frontend = ProcessSpec("frontend", 0, (sys.executable, "-c", code, port))
        return Processes((ProcessSpec("rank", 0, (sys.executable, "-c", rank)), frontend), {})

    def adapters() -> Registry[object]:
        table: Registry[object] = Registry("engine.backend")
        table.register("native")(processes)
        return table

    monkeypatch.setattr(deployment, "adapters", adapters)


def execute(tmp_path: Path, **deploy_keys: float) -> tuple[int, Path, str]:
    """Runs; gives the exit code, the run folder and what the user saw."""
    cfg = experiment(cluster={"results_dir": str(tmp_path)}, deploy=deploy_keys)
    out = io.StringIO()
    with none_left():
        code = run.run(cfg, ["load.osl=1"], Console(file=out, width=200))
    return code, tmp_path / "test/latest", out.getvalue()


def when(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    """Does ``action`` in the background as soon as ``condition`` holds."""

    def wait() -> None:
        while not condition():
            threading.Event().wait(0.05)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_a_rank_that_dies_while_loading_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch, 503, LOADING, "print('no such tensor'); raise SystemExit(3)")
    code, run_dir, seen = execute(tmp_path)
    assert code == 1
    status = read_status(run_dir)
    assert (status.state, status.reason) == ("failed", "rank-0 exited with code 3")
    assert [point.state for point in status.points] == ["cancelled"] * 4
    assert "failed: rank-0 exited with code 3" in seen
    assert "no such tensor" in seen
    assert (run_dir / "logs/rank-0.log").read_text() == "no such tensor\n"


def test_a_failure_that_the_frontend_reports_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch, 503, {"state": "failed", "error": "rank 0: out of memory"}, SLEEP)
    code, run_dir, _ = execute(tmp_path)
    assert code == 1
    assert read_status(run_dir).reason == "the engine failed to start: rank 0: out of memory"


class Frontend(http.server.ThreadingHTTPServer):
    """Gives ``answers`` to GET /health in turn, the last one for ever."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        frontend = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = frontend.answers.pop(0) if len(frontend.answers) > 1 else frontend.answers[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        self.answers = list(answers)
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Alive(Watch):
    """Of a job whose processes live for ever."""

    def __init__(self) -> None: ...

    def check(self) -> None: ...

    def marks(self) -> object:
        return 2

    def dump_stacks(self) -> None: ...


def loading(done: int) -> tuple[int, object]:
    return 503, {"state": "loading", "ranks": [{"rank": 0, "stage": "load", "done": done, "total": 10}]}


def test_loading_without_progress_is_given_up() -> None:
    out = io.StringIO()
    with Frontend(loading(3)) as frontend, LoadingBars(Console(file=out), 1) as bars:
        with pytest.raises(RunFailed, match=r"^no progress in loading for 0.3 s .*: rank 0 load 30%; "):
            wait_ready(frontend.url, Alive(), 0.3, bars)
        frontend.shutdown()
    assert out.getvalue() == "ranks ready 0/1, last: rank 0 load 30%\n"


def test_loading_takes_as_long_as_there_is_progress() -> None:
    """Each answer brings something new, so that a patience far shorter than the whole is never exhausted."""
    ready = (200, {"state": "ready", "ranks": [{"rank": 0, "stage": "ready", "done": 1, "total": 1}]})
    answers = [loading(done) for done in range(4)]
    out = io.StringIO()
    with Frontend(*answers, ready) as frontend, LoadingBars(Console(file=out), 1) as bars:
        wait_ready(frontend.url, Alive(), 0.0, bars)
        frontend.shutdown()
    assert out.getvalue().endswith("ranks ready 1/1\n")


@pytest.mark.parametrize(("num_ranks", "shown"), [(4, "rank 3 load"), (64, "ranks ready 0/64, last: rank 0 load 50%")])
def test_a_terminal_gets_a_bar_for_each_rank_or_one_for_many(num_ranks: int, shown: str) -> None:
    out = io.StringIO()
    with LoadingBars(Console(file=out, force_terminal=True, width=120), num_ranks) as bars:
        bars.update([RankProgress(rank, "load", 1, 2) for rank in range(num_ranks)])
    assert shown in out.getvalue()
    assert ("rank 3 load" in out.getvalue()) == (num_ranks == 4)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_run_says_so_and_leaves_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    deploy(monkeypatch, 503, LOADING, SLEEP)
    when((tmp_path / "test/latest/launch/rank-0.json").exists, lambda: os.kill(os.getpid(), signum))
    code, run_dir, _ = execute(tmp_path)
    assert code == 130
    status = read_status(run_dir)
    assert (status.state, status.reason) == ("cancelled", f"cancelled by {signum.name}")
    cfg = experiment(cluster={"results_dir": str(tmp_path)})
    assert from_mapping(yaml.safe_load((run_dir / "config.yaml").read_text()), ExpConfig) == cfg
    assert yaml.safe_load((run_dir / "overrides.yaml").read_text()) == ["load.osl=1"]
    assert (run_dir / "plan.json").exists() and (run_dir / "manifest.json").exists()


def test_a_load_generator_that_fails_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frontend is healthy, but serves another model."""
    deploy(monkeypatch, 200, {"state": "ready", "ranks": [], "data": [{"id": "another-model"}]}, SLEEP)
    code, run_dir, seen = execute(tmp_path)
    assert code == 1
    status = read_status(run_dir)
    assert status.state == "failed"
    assert "another-model" in status.reason
    assert "another-model" in (run_dir / "logs/loadgen-0.log").read_text()
    assert f"The last lines of {run_dir.resolve() / 'logs/loadgen-0.log'}" in seen


def test_the_load_generator_gets_every_key(tmp_path: Path) -> None:
    from toolkit.loadgen.options import parse

    cfg = experiment(load={"concurrency": [1, 3], "ignore_eos": False})
    (tmp_path / "launch").mkdir()
    options = parse(load.command(cfg, plan(cfg, 25_000), [Node("127.0.0.1", 25_000)], tmp_path, "")[3:])
    assert options.url == "http://127.0.0.1:25000"
    assert (options.model, options.tokenizer, options.num_gpus, options.out) == ("m", "bytes", 4, str(tmp_path))
    for key, value in to_mapping(cfg.load).items():
        assert getattr(options, key) == value


def test_a_load_generator_on_several_nodes(tmp_path: Path) -> None:
    """A server where the frontend would be; one process leads, the other joins it."""
    port = ports.free_range(5)
    cfg = experiment(load={"concurrency": [4], "nodes": 2, "osl": 3}, cluster={"port": port})
    planned = plan(cfg, port)
    assert planned.ports()[0, planned.loadgen.port] == "load generator"
    (tmp_path / "launch").mkdir()
    (tmp_path / "logs").mkdir()
    server, launcher = ScriptedServer(), LocalLauncher(port)
    server.models, server.behaviours = ["m"], [tokens(gap_s=0.02)]

    job = launcher.start([ProcessSpec("rank", 0, (sys.executable, "-c", SLEEP))], tmp_path, {})
    try:
        with server.running(port), Interrupts() as interrupts:
            nodes = [Node("127.0.0.1", port)]
            load.run_load(cfg, planned, nodes, tmp_path, launcher, Watch(job, tmp_path), interrupts)
    finally:
        job.stop(5)
    status = read_status(tmp_path)
    assert (status.state, status.points[0].state) == ("running", "done"), "the run's end is the launcher's to say"
    assert status.points[0].client is not None and status.points[0].client.workers == 2
    assert "joined 127.0.0.1" in (tmp_path / "logs/loadgen-1.log").read_text()


def test_nodes_that_cannot_reach_the_frontend_are_refused() -> None:
    cluster = {"launcher": "slurm", "gpus_per_node": 2, "device": "cpu"}
    found = "\n".join(check(experiment(load={"nodes": 3}, cluster=cluster)))
    assert "load.nodes=3 is more than the 2 nodes of the deployment: use at most 2" in found
    assert "deploy.host=127.0.0.1 is not reached from other nodes" in found
