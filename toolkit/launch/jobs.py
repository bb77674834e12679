"""``python -m toolkit.launch.jobs``: what runs, how far it is, and ending it; runs of this machine and jobs of Slurm.

Everything is read from run folders (who runs it, status, states of processes, progress of the load) and asked of Slurm
by job id; no accounting is needed. Ends nothing unless told to. Read next: ``follow.py``, ``job_file.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from toolkit import heartbeat
from toolkit.launch import child, job_file, queue
from toolkit.launch.follow import cancel as cancel_jobs
from toolkit.launch.follow import follow as follow_jobs
from toolkit.launch.follow import settle
from toolkit.launch.inside import LOG
from toolkit.launch.job_file import JobRecord
from toolkit.launch.launcher import STATE_DIR, ProcessState, tail
from toolkit.launch.load import PROGRESS, read_progress
from toolkit.launch.queue import JobState
from toolkit.launch.run import EXIT_CODES
from toolkit.records.status import RunState, RunStatus, read_status

USER_ERROR = 2
LIVE = ("queued", "running")
WIDE = 250  # where lines may be as long as they are: a pipe, a file
REFRESH_S = 1.0
ASK_S = 5.0  # between two questions to Slurm
HELP = """\
  jobs                      what is queued or runs, and the newest ten that are over (list --all: all)
  jobs follow [RUN]         live: state, processes by role, load point, tok/s; Ctrl-C only leaves
  jobs attach [RUN]         the terminal of the launcher again; Ctrl-C ends the run, as it does there
  jobs cancel RUN [--now]   end a run in order: what was measured is kept, a report is made; --now: at once
  RUN: a run folder, a Slurm job id, or an experiment's name (its newest run); without one: the newest that runs."""


@dataclass(frozen=True)
class Seen:
    """How a run stands."""

    run_dir: Path
    by: JobRecord
    state: RunState
    reason: str
    where: str
    roles: str
    load: str
    rate: str


def main() -> int:
    args = _parse()
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    folders = job_file.find(args.results.absolute())
    try:
        if args.action == "list":
            show(folders, console, everything=args.all)
            return 0
        run_dir = choose(folders, args.run, args.results)
        if args.action == "follow":
            return follow(run_dir, console)
        if args.action == "attach":
            return attach(run_dir, console)
        return cancel(run_dir, console, now=args.now)
    except (ValueError, queue.SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return USER_ERROR


def choose(folders: Sequence[Path], word: str, results: Path) -> Path:
    """The run that ``word`` means. Raises ``ValueError`` that says what there is."""
    if not word:
        alive = [f for f in folders if read_status(f).state in LIVE]
        if not alive:
            raise ValueError(f"nothing is queued or runs under {results}: name a run; `list --all` shows them")
        return alive[0]
    if (Path(word) / STATE_DIR).is_dir():
        return Path(word).resolve()
    for folder in folders:
        by = job_file.read(folder)
        if word in (folder.parent.name, by.job_id if by else None):
            return folder
    raise ValueError(
        f"{word} is no run folder, no job id and no experiment under {results}: `list --all` shows what there is, "
        "--results names another folder of results"
    )


def show(folders: Sequence[Path], console: Console, everything: bool) -> None:
    """A table: what is alive, then the newest that are over."""
    table = Table("job", "run", "state", "where", "processes", "load", "tok/s", box=box.SIMPLE_HEAD)
    over = 0
    for folder in folders:
        seen = look(folder)
        if seen is None:
            continue
        over += seen.state not in LIVE
        if over <= 10 or everything or seen.state in LIVE:
            name = f"{folder.parent.name}/{folder.name}"
            table.add_row(_who(seen.by), name, _state(seen), seen.where, seen.roles, seen.load, seen.rate)
    console.print(table if table.row_count else "No runs yet.")


def look(run_dir: Path, job: JobState | None = None) -> Seen | None:
    """How the run stands now; Slurm is asked (unless ``job`` is its answer) only about jobs not known to be over."""
    by = job_file.read(run_dir)
    if by is None:
        return None
    status, where = read_status(run_dir), by.host
    if by.job_id and status.state in LIVE:
        job = job or _ask(by.job_id)
        if job is None:
            where = "Slurm does not answer here"
        elif job.active:
            where = job.nodes or f"{job.state} {job.reason}".strip().lower()
        else:
            settle(run_dir, job)
            status, where = read_status(run_dir), job.nodes
    elif by.job_id:
        where = ""
    elif status.state in LIVE and (gone(by) or heartbeat.run_state(run_dir, status) == "dead"):
        status.state, status.reason = "failed", "its launcher is gone without a word"
    load, rate = _load(run_dir, status)
    return Seen(run_dir, by, status.state, status.reason, where, roles(run_dir), load, rate)


def _ask(job_id: str) -> JobState | None:
    try:
        return queue.job(job_id)
    except queue.SlurmError:
        return None


def gone(by: JobRecord) -> bool:
    """Whether a launcher of this machine lives no more; those of others are known by their heartbeat."""
    if by.host != platform.node():
        return False
    process = child.find(by.pid, by.create_time)
    return process is None or not child.is_alive(process)  # dead, if nobody has asked yet how it ended


def roles(run_dir: Path) -> str:
    """``rank 4/4, frontend 1/1``: processes that run, of those that were started; the dead by name."""
    states = []
    for file in sorted((run_dir / STATE_DIR).glob("*-*.json")):
        try:
            if not file.name.startswith("preflight-"):  # over when the others begin
                states.append(msgspec.json.decode(file.read_bytes(), type=ProcessState))
        except msgspec.DecodeError:
            continue  # arguments of a role, not a state
    started = Counter(s.name.rpartition("-")[0] for s in states)
    running = Counter(s.name.rpartition("-")[0] for s in states if s.state == "running")
    dead = [f"{s.name} {s.returncode}" for s in states if s.state == "exited" and s.returncode]
    parts = [f"{role} {running[role]}/{count}" for role, count in started.items()]
    return ", ".join(parts + dead[:3])


def follow(run_dir: Path, console: Console) -> int:
    """Shows the run until it is over; Ctrl-C leaves it alone. The exit code is the run's."""
    by = job_file.read(run_dir)
    if by is None:
        raise ValueError(f"{run_dir} does not say who runs it")
    job, asked = _ask(by.job_id) if by.job_id else None, time.monotonic()
    try:
        with Live(console=console, auto_refresh=False) as live:
            while seen := look(run_dir, job):
                live.update(_panel(seen), refresh=True)
                if seen.state not in LIVE:
                    break
                time.sleep(REFRESH_S)
                if by.job_id and time.monotonic() - asked >= ASK_S:
                    job, asked = _ask(by.job_id), time.monotonic()
    except KeyboardInterrupt:
        return 0
    return EXIT_CODES.get(read_status(run_dir).state, 0)


def attach(run_dir: Path, console: Console) -> int:
    """What the launcher printed and prints, as where it was started."""
    by = job_file.read(run_dir)
    if by is None or not by.job_id:
        raise ValueError(f"{run_dir} is no job of Slurm; its launcher prints where it was started: use follow")
    return follow_jobs([run_dir], console)


def cancel(run_dir: Path, console: Console, now: bool) -> int:
    """Ends the run and waits until it is over; 0 when it is."""
    seen = look(run_dir)
    if seen is None or seen.state not in LIVE:
        console.print(f"{run_dir} is over: {seen.state if seen else 'nobody runs it'}")
        return 0
    if seen.by.job_id:
        if now:
            queue.cancel(seen.by.job_id)
        cancel_jobs([run_dir], console)
        return 0
    if seen.by.host != platform.node():
        raise ValueError(f"{run_dir} runs on {seen.by.host}: cancel it there")
    os.kill(seen.by.pid, signal.SIGKILL if now else signal.SIGINT)  # its processes do not outlive it
    if not now:
        console.print("Ending it in order: what was measured is written, the report is made; --now ends it at once")
    while not gone(seen.by):
        time.sleep(0.1)
    console.print(f"{run_dir}: {read_status(run_dir).state}")
    return 0


def _panel(seen: Seen) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = {
        "run": str(seen.run_dir), "job": _who(seen.by), "state": _state(seen), "where": seen.where,
        "processes": seen.roles, "load": seen.load, "tok/s": seen.rate, "last word": _last(seen.run_dir),
    }  # fmt: skip
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _state(seen: Seen) -> str:
    return seen.state + (f": {seen.reason}" if seen.reason else "")


def _who(by: JobRecord) -> str:
    return by.job_id or f"pid {by.pid}"


def _load(run_dir: Path, status: RunStatus) -> tuple[str, str]:
    """(load point, tok/s)"""
    done = sum(point.state == "done" for point in status.points)
    text = f"{done}/{len(status.points)} points"
    state = read_progress(run_dir / STATE_DIR / PROGRESS)
    if state is None or status.state not in LIVE:
        return text, ""
    what = f"rate {state['request_rate']:g}" if state.get("request_rate") else f"concurrency {state['concurrency']}"
    return f"{text}, {what} {state['phase']} {state['done']}/{state['total']}", f"{state['output_tok_s']:.1f}"


def _last(run_dir: Path) -> str:
    """The launcher's last line, which tells of loading; of a run without Slurm it is in its own terminal."""
    lines = [line for line in tail(run_dir / LOG, 5) if line.strip()]
    return lines[-1] if lines else ""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.launch.jobs", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Lists, follows, attaches to and cancels runs.", epilog=HELP,
    )  # fmt: skip
    parser.add_argument("action", nargs="?", default="list", choices=["list", "follow", "attach", "cancel"])
    parser.add_argument("run", nargs="?", default="", metavar="RUN")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results (cluster.results_dir)")
    parser.add_argument("--all", action="store_true", help="list: runs that are over too, however many")
    parser.add_argument("--now", action="store_true", help="cancel: do not wait for an orderly end")
    args = parser.parse_args()
    if args.action == "cancel" and not args.run:
        parser.error("cancel needs a RUN: it ends nothing by guess")
    return args


if __name__ == "__main__":
    sys.exit(main())
