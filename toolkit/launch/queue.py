"""What Slurm knows, asked with its own commands: nodes, and how a job stands. Works without accounting.

``scontrol`` knows jobs that wait, run, or ended in the last minutes (MinJobAge); ``sacct`` knows the others, where a
site has it. Everything goes by job id. Knows nothing of experiments.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

TIMEOUT_S = 60.0
ANSWER_S = 3.0
ACTIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
})  # fmt: skip


class SlurmError(Exception):
    """A Slurm command failed; ``str()`` is its command and what it said."""


@dataclass(frozen=True)
class JobState:
    """How a job stands.

    Attributes:
        state: Slurm's word: PENDING, RUNNING, COMPLETED, NODE_FAIL, ...; empty: Slurm does not know the job any more.
        reason: why it waits, or was ended.
        start: when it started or, as far as the scheduler can say, will start; empty: not known.
        nodes: the node list; empty before it starts.
        restarts: how often it was requeued.
        first_node: where its batch script runs, or should have run.
    """

    state: str
    reason: str = ""
    start: str = ""
    nodes: str = ""
    restarts: int = 0
    first_node: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def call(*argv: str, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a Slurm command. Raises ``SlurmError``."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL, env=env
        )
    except FileNotFoundError:
        raise SlurmError(f"{argv[0]} is not installed here: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(argv)} has not answered for {TIMEOUT_S:g} s") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def hostnames(nodelist: str) -> list[str]:
    """``node[1-3]`` -> node1, node2, node3."""
    return call("scontrol", "show", "hostnames", nodelist).split()


def addresses(names: Sequence[str]) -> list[str]:
    """Where Slurm itself reaches each node (NodeAddr)."""
    lines = call("scontrol", "--oneliner", "show", "node", ",".join(names)).splitlines()
    found = {
        name[1]: addr[1] for line in lines if (name := _field("NodeName", line)) and (addr := _field("NodeAddr", line))
    }
    return [found.get(name, name) for name in names]


def silent(names: Sequence[str]) -> list[str]:
    """Those nodes whose slurmd takes no connection: down, cut off, or about to be found so by Slurm itself."""
    lines = call("scontrol", "--oneliner", "show", "node", ",".join(names)).splitlines()
    config = call("scontrol", "show", "config")
    default = re.search(r"^SlurmdPort\s*=\s*(\d+)", config, re.MULTILINE)

    def answers(line: str) -> bool:
        addr, port = _field("NodeAddr", line), _field("Port", line) or default
        if addr is None or port is None:
            return True  # nothing to ask
        try:
            socket.create_connection((addr[1], int(port[1])), ANSWER_S).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(max_workers=32) as pool:
        found = list(pool.map(answers, lines))
    return [name[1] for line, ok in zip(lines, found) if not ok and (name := _field("NodeName", line))]


def job(job_id: str) -> JobState:
    """How the job (``17``, ``17_3`` of an array, ``17+0`` of a heterogeneous one) stands; asks as few as possible."""
    try:
        text = call("scontrol", "--oneliner", "show", "job", job_id)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return _accounted(job_id)
        raise
    return parse_job(text.splitlines()[0])


def parse_job(line: str) -> JobState:
    """A line of ``scontrol --oneliner show job``."""

    def value(key: str) -> str:
        found = _field(key, line)
        return found[1] if found and found[1] not in ("(null)", "None", "Unknown", "N/A") else ""

    return JobState(
        value("JobState"), value("Reason"), value("StartTime"), value("NodeList"), int(value("Restarts") or 0),
        value("BatchHost"),
    )  # fmt: skip


def why_ending() -> str:
    """What Slurm says about ending the job that this process is in; empty when it has said nothing.

    ``CANCELLED``, or the cause: ``PREEMPTION``, ``TIME LIMIT``, ``NODE FAILURE``. While a job is being ended, its state
    is only COMPLETING; the cause is in the line that slurmstepd writes into the job's output.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        return ""
    try:
        out = _field("StdOut", call("scontrol", "--oneliner", "show", "job", job_id).splitlines()[0])
        text = Path(out[1]).read_text(errors="replace") if out else ""
    except (SlurmError, OSError):
        return ""
    begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(psutil.Process().create_time()))
    said = re.findall(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT (\S+)(?: DUE TO ([A-Z ]+))?", text)
    causes = [cause.strip() or "CANCELLED" for when, cause in said if when >= begin]  # not of an earlier start
    return causes[-1] if causes else ""


def signal_batch(job_id: str, name: str) -> None:
    """Sends a signal to the batch script alone: the run ends itself in order, without the limit of Slurm's KillWait."""
    call("scancel", "--batch", f"--signal={name}", job_id)


def cancel(job_id: str) -> None:
    call("scancel", job_id)


def submit(script: Path) -> str:
    """The id of a new job. Nothing of the job that this process may be in gets into it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    return call("sbatch", "--parsable", str(script), env=env).strip().partition(";")[0]


def requeue(job_id: str) -> None:
    call("scontrol", "requeue", job_id)


def _accounted(job_id: str) -> JobState:
    """From the accounting, where there is one: a job that ended a while ago."""
    try:
        text = call(
            "sacct", "--noheader", "--parsable2", "--allocations", "--format=State,NodeList,Start", "-j", job_id
        )
    except SlurmError:
        return JobState("")
    if not text.strip():
        return JobState("")
    state, nodes, start = text.splitlines()[0].split("|")
    return JobState(state.split()[0], start=start, nodes=nodes)  # CANCELLED by 1000


def _field(key: str, line: str) -> re.Match[str] | None:
    return re.search(rf"(?:^|\s){key}=(\S*)", line)
