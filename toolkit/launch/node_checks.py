"""What one node finds out about itself before ranks start: ``look``. Each check is a function that returns sentences.

GPUs through NVML where its bindings are there (extra `nodes`), else through nvidia-smi; peer links by NVML only. Nodes
other than the first also ask the first one for the time, which shows both their clocks and whether they reach it.
Changes nothing on the machine. The verdict over all nodes is ``preflight.py``'s.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from toolkit.launch import ports
from toolkit.launch.clock import clock, measure_offset

GB = 10**9
COMMAND_S = 30.0
CLOCK_SERVED_S = 60.0
BUSY_SHARE = 0.05  # of a GPU's memory that may be in use by others
FIRST_WORD = "first-node"


class Ask(msgspec.Struct, frozen=True):
    """What every node is told.

    Attributes:
        ranks, hosts, ports: by node.
        rank_bytes: memory that a rank needs; 0: not known.
        clock_port: on the first node, where it tells the time.
    """

    run_dir: str
    device: str
    ranks: list[int]
    rank_bytes: int
    hosts: list[str]
    ports: list[list[int]]
    clock_port: int
    min_disk_bytes: int
    max_clock_offset_s: float
    wait_s: float = 30.0  # for what the first node wrote, and for its clock


class Report(msgspec.Struct):
    """What a node says of itself."""

    host: str = ""
    problems: list[str] = []
    warnings: list[str] = []
    cpu: str = ""
    threads: int = 0
    memory_bytes: int = 0
    kernel: str = ""
    driver: str = ""
    gpu_names: list[str] = []
    gpu_serials: list[str] = []  # UUIDs
    links: list[str] = []  # pairs of GPUs that cannot reach each other's memory
    clock_offset_s: float | None = None  # of this node minus the first; None: not asked
    disk_free_bytes: int = 0


def look(ask: Ask, node: int, folder: Path) -> Report:
    """Everything about this node; what cannot be found out is no problem by itself."""
    memory = psutil.virtual_memory()
    report = Report(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        problems=[],
        warnings=[],
        cpu=platform.processor() or platform.machine(),
        threads=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        kernel=platform.release(),
    )
    report.problems += _ports(ask.ports[node])
    others_ask = node == 0 and len(ask.hosts) > 1
    with clock(ask.hosts[0], ask.clock_port) if others_ask else contextlib.nullcontext():
        report.problems += _shared_folder(folder, node, ask.wait_s)
        report.problems += _disk(ask, report)
        if ask.device == "cuda":
            report.problems += _gpus(ask, node, report)
        else:
            report.problems += _host_memory(ask, node, memory.available)
        if node > 0:
            report.problems += _clock_offset(ask, report)
        elif len(ask.hosts) > 1:
            _serve_others(folder, len(ask.hosts))
    return report


def _ports(wanted: list[int]) -> Iterator[str]:
    for port in wanted:
        if not ports.is_free(port):
            yield f"port {port} is in use{ports.owner(port)}"


def _shared_folder(folder: Path, node: int, wait_s: float) -> Iterator[str]:
    """The first node writes; every other one must be able to read it."""
    word = folder / FIRST_WORD
    if node == 0:
        try:
            word.write_text(socket.gethostname())
        except OSError as error:
            yield f"the run folder cannot be written to: {error.strerror}"
        return
    deadline = time.monotonic() + wait_s
    while not word.exists():
        if time.monotonic() > deadline:
            yield f"what the first node wrote into the run folder is not seen after {wait_s:g} s: it is not shared"
            return
        time.sleep(0.1)


def _disk(ask: Ask, report: Report) -> Iterator[str]:
    for what, path in (("run folder", ask.run_dir), ("temporary folder", tempfile.gettempdir())):
        try:
            free = shutil.disk_usage(path).free
        except OSError as error:
            yield f"the {what} {path} cannot be looked at: {error.strerror}"
            continue
        report.disk_free_bytes = min(report.disk_free_bytes or free, free)
        if free < ask.min_disk_bytes:
            need = f"health.min_disk_gb={ask.min_disk_bytes / GB:g}"
            yield f"{free / GB:.1f} GB free in the {what} {path}, {need} are needed"


def _host_memory(ask: Ask, node: int, available: int) -> Iterator[str]:
    need = ask.rank_bytes * ask.ranks[node]
    if need > available:
        yield f"{available / GB:.1f} GB of memory are free, its {ask.ranks[node]} ranks need {need / GB:.1f} GB"


# --- GPUs -------------------------------------------------------------------------------------------


def _gpus(ask: Ask, node: int, report: Report) -> Iterator[str]:
    need = ask.ranks[node]
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        yield from _gpus_by_command(need, report)
        return
    except Exception as error:  # NVMLError: no driver, or one that does not answer
        yield f"NVML: {error}: the driver does not work on this node"
        return
    report.driver = str(nvml.nvmlSystemGetDriverVersion())
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    report.gpu_names = [str(nvml.nvmlDeviceGetName(handle)) for handle in handles]
    report.gpu_serials = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    if len(handles) < need:
        yield f"{len(handles)} GPUs are seen, its {need} ranks need {need}"
    for index, handle in enumerate(handles[:need]):
        yield from _gpu(nvml, index, handle, ask.rank_bytes, report)
    yield from _peer_links(nvml, handles[:need], report)


def _gpu(nvml: Any, index: int, handle: Any, rank_bytes: int, report: Report) -> Iterator[str]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    users = _try(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    whose = ", ".join(f"pid {user.pid} ({_process_name(user.pid)})" for user in users)
    whose = f", in use by {whose}" if whose else ""
    if rank_bytes > memory.free:
        yield f"GPU {index}: {memory.free / GB:.1f} GB free, a rank needs {rank_bytes / GB:.1f} GB{whose}"
    elif users or memory.total - memory.free > BUSY_SHARE * memory.total:
        used = (memory.total - memory.free) / GB
        report.warnings.append(f"GPU {index} is not idle: {used:.1f} GB of its memory are taken{whose}")
    kind, scope = getattr(nvml, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1), getattr(nvml, "NVML_VOLATILE_ECC", 0)
    if errors := _try(nvml.nvmlDeviceGetTotalEccErrors, handle, kind, scope):
        yield f"GPU {index}: {errors} uncorrected memory errors since it was started"
    reasons = int(_try(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0)
    if reasons & 0x40:  # hardware thermal slowdown
        report.warnings.append(f"GPU {index} is slowed down by heat before any work")


def _peer_links(nvml: Any, handles: list[Any], report: Report) -> Iterator[str]:
    """Each pair must reach each other's memory: all-to-all between GPUs of a node goes that way."""
    for a, one in enumerate(handles):
        for b in range(a + 1, len(handles)):
            status = _try(nvml.nvmlDeviceGetP2PStatus, one, handles[b], nvml.NVML_P2P_CAPS_INDEX_READ)
            if status is not None and status != nvml.NVML_P2P_STATUS_OK:
                report.links.append(f"{a}-{b}")
    if report.links:
        shown = ", ".join(report.links[:8])
        yield f"no peer access between GPUs {shown}: nvidia-smi topo -p2p r tells why"


def _gpus_by_command(need: int, report: Report) -> Iterator[str]:
    """Without NVML's bindings: what nvidia-smi says, which is less."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi: {error}"
        return
    if done.returncode:
        yield f"nvidia-smi fails: {(done.stdout + done.stderr).strip()[:200]}"
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    report.gpu_names, report.driver = [row[0] for row in rows], rows[0][1] if rows else ""
    report.warnings.append("memory and peer links of GPUs are not checked: pip install 'wideep-toolkit[nodes]'")
    if len(rows) < need:
        yield f"{len(rows)} GPUs are seen, its {need} ranks need {need}"


def _try(question: Any, *arguments: Any) -> Any:
    with contextlib.suppress(Exception):  # NVMLError: this GPU does not say
        return question(*arguments)
    return None


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "of another container or user"


# --- the clock --------------------------------------------------------------------------------------


def _serve_others(folder: Path, nodes: int) -> None:
    """The first node stays until all others have reported: they ask it for the time."""
    deadline = time.monotonic() + CLOCK_SERVED_S
    while time.monotonic() < deadline:
        if all((folder / f"node-{node}.json").exists() for node in range(1, nodes)):
            return
        time.sleep(0.05)


def _clock_offset(ask: Ask, report: Report) -> Iterator[str]:
    """By the exchange with the shortest way there and back: its middle is when the first node looked at its clock."""
    try:
        report.clock_offset_s = measure_offset(ask.hosts[0], ask.clock_port, ask.wait_s)
    except OSError as error:
        yield f"the first node does not answer at {ask.hosts[0]}:{ask.clock_port}: {error}"
        return
    if abs(report.clock_offset_s) > ask.max_clock_offset_s:
        yield (
            f"its clock is {report.clock_offset_s * 1e3:+.1f} ms off the first node's, more than "
            f"health.max_clock_offset_ms={ask.max_clock_offset_s * 1e3:g}"
        )
