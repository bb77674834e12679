"""One run: model -> run folder -> start -> healthy -> load -> collect -> stop -> report.

Whatever happens on the way (a dead rank, Ctrl-C, SIGTERM, a bug), every process is ended, ``status.json`` says how
the run ended and why, and what was measured stays. Knows the order of things and nothing of how each is done.
Read next: ``deployment.py``, ``standing.py``, ``load.py``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import yaml
from rich.console import Console

from toolkit import point_files, records
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import to_mapping
from toolkit.heartbeat import beating
from toolkit.launch import attempts, child, job_file, provenance, provenance_files, queue, sampler
from toolkit.launch.check_model import check_model, will_build
from toolkit.launch.interrupts import Cancelled, Interrupts
from toolkit.launch.launcher import STATE_DIR
from toolkit.launch.load import LoadFailed, run_load
from toolkit.launch.preflight import BadNodes
from toolkit.launch.show import say
from toolkit.launch.standing import Standing
from toolkit.launch.watch import RunFailed, exit_text
from toolkit.records.files import replacing, write_json
from toolkit.records.status import PointStatus, RunState, RunStatus, read_status, write_status

log = logging.getLogger(__name__)

STOP_GRACE_S = 10.0
EXIT_CODES: dict[RunState, int] = {"done": 0, "failed": 1, "cancelled": 130}


def run(
    cfg: ExpConfig,
    overrides: Sequence[str],
    console: Console,
    run_dir: Path | None = None,
    standing: Standing | None = None,
    goes_on: Callable[[Path], bool] = lambda run_dir: False,
) -> int:
    """Runs ``cfg``, which ``check`` has found sound, and returns the exit code.

    Args:
        run_dir: a folder that ``create_folder`` made before; None: a new one.
        standing: where the deployment comes from and may stay, when other runs come before or after; None: neither.
        goes_on: asked at the end, with the run's folder, whether the run starts again elsewhere: no report then.

    Raises:
        ValueError: a user's mistake that only shows now; nothing has been started.
    """
    ended_by: BaseException | None = None
    again = False
    with Interrupts() as interrupts:
        try:
            build_model(cfg, console)
            if run_dir is None:
                with interrupts.held():
                    run_dir = create_folder(cfg, overrides)
                    job_file.write(run_dir, job_file.of_this_process())
            with beating(run_dir):
                if anything_to_do(cfg, run_dir, console):
                    with contextlib.ExitStack() as stack:
                        own = standing or stack.enter_context(Standing())
                        deploy_and_load(cfg, run_dir, own, interrupts, console)
        except (Exception, Cancelled) as error:
            if run_dir is None and isinstance(error, ValueError):
                raise
            ended_by = error
        with interrupts.ignored():
            if isinstance(ended_by, Cancelled) and (word := queue.why_ending()):
                ended_by = Cancelled(f"{ended_by} (Slurm: {word})")
            if run_dir is not None:
                close_status(run_dir, ended_by)
                attempts.note_end(run_dir, state_after(ended_by), reason(ended_by))
            if ended_by is not None:
                tell(console, ended_by)
            if run_dir is not None:
                again = goes_on(run_dir)
        try:
            if run_dir is not None and not again:
                report(run_dir)
        except Cancelled:
            say(console, f"Stopped before the report was made: python -m toolkit.analysis report {run_dir}")
    return EXIT_CODES[state_after(ended_by)]


def build_model(cfg: ExpConfig, console: Console) -> None:
    """Builds the demo model where the experiment asks for it and it is not there yet."""
    if not will_build(cfg.model):
        return
    say(console, f"Building {cfg.model.build} into {cfg.model.path} (once)")
    process = child.start([sys.executable, "-m", "toolkit.engine.demo_model", "--out", cfg.model.path], log=None)
    try:
        code = process.wait()
    finally:
        child.end(process, STOP_GRACE_S)
    if code != 0:
        raise RunFailed(exit_text("the model build", code))
    if errors := check_model(cfg):
        raise ValueError("\n".join(errors))


def create_folder(cfg: ExpConfig, overrides: Sequence[str], state: RunState = "running") -> Path:
    """The run folder with everything that is known before the start: a new one, or the one to go on with."""
    run_dir = attempts.find(cfg)
    again = run_dir is not None
    if run_dir is None:
        results, named = Path(cfg.cluster.results_dir).absolute(), Path(cfg.run_dir).expanduser().absolute()
        run_dir = records.new_run_folder(results, cfg.exp, named if cfg.run_dir else None)
    (run_dir / STATE_DIR).mkdir(exist_ok=True)
    if again:
        attempts.keep_words(run_dir)
    with replacing(run_dir / records.CONFIG, "w") as out:
        yaml.safe_dump(to_mapping(cfg), out, sort_keys=False)
    with replacing(run_dir / records.OVERRIDES, "w") as out:
        yaml.safe_dump(list(overrides), out)
    write_json(run_dir / STATE_DIR / attempts.COMMAND, provenance.command(sys.orig_argv))
    if again:
        attempts.reopen_status(run_dir, state)
    else:
        from toolkit.loadgen.points import points_of

        points = [PointStatus(point.concurrency, repeat=point.repeat) for point in points_of(cfg.load)]
        write_status(run_dir, RunStatus(state, points=points))
    return run_dir


def anything_to_do(cfg: ExpConfig, run_dir: Path, console: Console) -> bool:
    """Whether a load point is not done yet; says what there is of a run that is taken up again."""
    if not point_files.read_points(run_dir):
        return True
    left, lines = attempts.left_to_do(cfg, run_dir)
    say(console, f"Resuming {run_dir}: {lines[0]}")
    for line in lines[1:]:
        say(console, line)
    if not left:
        say(console, "Every load point is done: nothing is started")
    return left > 0


def deploy_and_load(
    cfg: ExpConfig, run_dir: Path, standing: Standing, interrupts: Interrupts, console: Console
) -> None:
    """Starts the deployment, or takes the one that stands, runs the sweep against it, and gives it back."""
    made_of = provenance.manifest(sys.orig_argv) | {"container": provenance_files.container(cfg.cluster)}
    attempt = attempts.begin(run_dir, made_of)
    provenance_files.write(run_dir, Path(__file__).parent)
    say(console, f"Run folder: {run_dir}")
    deployment = standing.take(cfg, run_dir, console)
    healthy = False
    try:
        if not deployment.loads:
            deployment.start(run_dir, interrupts, console)
        deployment.serve(run_dir)
        plan, launcher = deployment.plan(cfg), deployment.launcher
        try:
            run_load(cfg, plan, deployment.nodes, run_dir, launcher, deployment.watch, interrupts, attempt)
            healthy = True
        except LoadFailed:
            healthy = True
            raise
        finally:
            deployment.collect_experts()
    except BadNodes:
        raise
    except RunFailed as error:
        raise deployment.explained(error) from None
    finally:
        with interrupts.ignored():
            standing.give_back(run_dir, healthy)
            collect_nodes(run_dir)


def collect_nodes(run_dir: Path) -> None:
    """Makes nodes.parquet of what the samplers left. Its lack is a gap in the report."""
    try:
        sampler.collect(run_dir)
    except (OSError, ValueError) as error:
        log.warning("no %s: %s", records.NODES, error)


def close_status(run_dir: Path, error: BaseException | None) -> None:
    """The last word in status.json: how the run ended, and for points that did not end, why."""
    try:
        status = read_status(run_dir)
    except (OSError, msgspec.DecodeError):
        status = RunStatus()
    status.state, status.reason = state_after(error), reason(error)
    for point in status.points:
        if error is not None and point.state in ("pending", "running", "cancelled"):
            point.state, point.reason = "cancelled", status.reason
    write_status(run_dir, status)


def report(run_dir: Path) -> None:
    """Tables and charts of what was measured. A failure here loses nothing: it can be made again."""
    if not (run_dir / records.REQUESTS).exists():
        return
    from toolkit.analysis.finish import finish_run

    try:
        table = finish_run(run_dir)
    except Exception:
        log.exception("no report; the measurements are safe: python -m toolkit.analysis report %s", run_dir)
        return
    sys.stdout.write(f"{table}\nRun folder: {run_dir}\nReport:     {run_dir / records.REPORT}\n")


def state_after(error: BaseException | None) -> RunState:
    if error is None:
        return "done"
    return "cancelled" if isinstance(error, Cancelled) else "failed"


def reason(error: BaseException | None) -> str:
    if error is None or isinstance(error, (RunFailed, Cancelled)):
        return str(error or "")
    return f"{type(error).__name__}: {error}"


def tell(console: Console, error: BaseException) -> None:
    """Why the run ended, with the end of the log that tells more."""
    text = f"{state_after(error)}: {reason(error)}"
    console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
    if isinstance(error, RunFailed) and error.log is not None:
        say(console, f"The last lines of {error.log}:")
        for line in error.log_tail:
            say(console, f"  {line}")
    elif not isinstance(error, (RunFailed, Cancelled)):
        log.error("this is a fault of the launcher", exc_info=error)
