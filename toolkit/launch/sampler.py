"""One process a node that watches the machine: GPUs by NVML, CPUs, memory, network; ``nodes/node-<i>.arrows``.

``python -m toolkit.launch.sampler --out FILE --interval S`` samples until SIGTERM. A role of its own, so that what it
costs is never a rank's: its log says how many milliseconds of a core a sample took. NVML comes with the extra `nodes`
(nvidia-ml-py); without it, or without GPUs, the rows of the host are all there is. It reads counters and changes
nothing. Read next: ``analysis/nodes.py``, which makes figures of the rows (``records.samples.NodeSample``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from toolkit import records
from toolkit.config.experiment import ExpConfig
from toolkit.launch.launcher import ProcessSpec
from toolkit.records.samples import HOST, NodeSample
from toolkit.records.streams import open_rows, read_streams
from toolkit.records.tables import write_table

log = logging.getLogger("toolkit.launch.sampler")

FLUSH_S = 1.0  # how much a crash, or the end of a load on a deployment that goes on, may lose
RDMA = Path("/sys/class/infiniband")
RAPL = Path("/sys/class/powercap")
RDMA_WORD = 4  # bytes: InfiniBand counts data in words of four


def specs(cfg: ExpConfig, num_nodes: int, run_dir: Path) -> list[ProcessSpec]:
    """A sampler for each node; its end does not end the run."""
    if not cfg.health.sample_interval_s:
        return []
    words = (sys.executable, "-m", "toolkit.launch.sampler", "--interval", f"{cfg.health.sample_interval_s:g}", "--out")
    return [
        ProcessSpec(
            role="sampler",
            index=node,
            argv=(*words, str(run_dir / records.NODE_SAMPLES / f"node-{node}.arrows")),
            env={"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            node=node,
            group="samplers",
            critical=False,
        )
        for node in range(num_nodes)
    ]


def collect(run_dir: Path) -> None:
    """Puts what every node's sampler left into nodes.parquet."""
    rows = read_streams(run_dir / records.NODE_SAMPLES, NodeSample)
    if rows is not None:
        write_table(run_dir / records.NODES, rows)


class Gpus:
    """The GPUs of this node through NVML; none where there is no driver or no library."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self.handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except ImportError:
            if Path("/dev/nvidiactl").exists():
                log.warning("GPUs are not sampled: NVML's bindings are missing: pip install 'wideep-toolkit[nodes]'")
        except Exception as error:  # NVML's own class, which is not known without it
            log.info("no GPUs are sampled: %s", error)

    def sample(self, now: float, node: str) -> Iterator[NodeSample]:
        nvml = self._nvml if self.handles else None
        for index, handle in enumerate(self.handles):
            assert nvml is not None
            memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
            used = _ask(nvml.nvmlDeviceGetUtilizationRates, handle)
            power = _ask(nvml.nvmlDeviceGetPowerUsage, handle)
            reasons = _ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
            yield NodeSample(
                time=now, node=node, gpu=index,
                utilization=used.gpu / 100 if used else math.nan,
                memory_used_bytes=memory.used if memory else 0,
                memory_total_bytes=memory.total if memory else 0,
                power_w=power / 1e3 if power is not None else math.nan,
                temperature_c=_float(_ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)),
                sm_clock_mhz=_float(_ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)),
                mem_clock_mhz=_float(_ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM)),
                throttle=int(reasons or 0),
            )  # fmt: skip


class Host:
    """CPUs, memory and network of this node; power where RAPL may be read."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call begins the interval
        self._energy = self._read_energy()

    def sample(self, now: float, node: str) -> NodeSample:
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        rdma = {name: _sum_files(RDMA.glob(f"*/ports/*/counters/port_{name}_data")) for name in ("rcv", "xmit")}
        return NodeSample(
            time=now, node=node, gpu=HOST,
            utilization=psutil.cpu_percent() / 100,
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            power_w=self._power(),
            net_rx_bytes=float(network.bytes_recv) if network else math.nan,
            net_tx_bytes=float(network.bytes_sent) if network else math.nan,
            rdma_rx_bytes=rdma["rcv"] * RDMA_WORD,
            rdma_tx_bytes=rdma["xmit"] * RDMA_WORD,
        )  # fmt: skip

    def _power(self) -> float:
        (before, at), self._energy = self._energy, self._read_energy()
        after, now = self._energy
        watts = (after - before) / 1e6 / max(now - at, 1e-9)
        return watts if watts >= 0 else math.nan  # the counter went round

    def _read_energy(self) -> tuple[float, float]:
        """(microjoules of all packages, when); only root may read them on most systems."""
        return _sum_files(RAPL.glob("intel-rapl:?/energy_uj")), time.monotonic()


def run(out: Path, interval_s: float, over: threading.Event) -> None:
    """Samples until ``over``."""
    gpus, host, node, taken = Gpus(), Host(), socket.gethostname(), 0
    rows: list[NodeSample] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_rows(out, NodeSample) as write:
        due, written, began = time.monotonic(), time.monotonic(), time.process_time()
        while not over.is_set():
            now = time.time()
            rows += [host.sample(now, node), *gpus.sample(now, node)]
            taken += 1
            if taken == 1:
                began = time.process_time()  # what is loaded for the first look is no part of what a look costs
            if time.monotonic() - written >= FLUSH_S:
                write(rows)
                rows, written = [], time.monotonic()
            due = max(due + interval_s, time.monotonic())  # what was missed is not made up for
            over.wait(due - time.monotonic())
        if rows:
            write(rows)
    log.info("%d samples, %.2f ms of CPU each", taken, 1e3 * (time.process_time() - began) / max(taken - 1, 1))


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML says; None where this GPU, or this driver, does not."""
    with contextlib.suppress(Exception):  # NVMLError, whose class is the optional library's
        return question(*arguments)
    return None


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _sum_files(paths: Iterable[Path]) -> float:
    """The sum of the numbers in files; NaN where there is none that may be read."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append(float(path.read_text()))
    return sum(found) if found else math.nan


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.launch.sampler", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="Arrow stream to write")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two samples")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *given: over.set())
    try:
        run(options.out, options.interval, over)
    except Exception:  # no reason to end a run, and no exit code that could be taken for one
        log.exception("no more samples of this node")
    return 0


if __name__ == "__main__":
    sys.exit(main())
