"""``make measure-gpu``: every test and benchmark that wants GPUs, on this machine's, as many beside each other as fit.

    python -m tests.bench.gpu_host --out DIR [--only NAME ...] [--minutes M] [--beside N] [--list]

For a machine that is yours for minutes: jobs start in their order, each on GPUs and cores of its own, and what does not
fit into the time is named. Tests may share GPUs (``--beside 3``: up to three jobs on each); what is timed should not. A
job leaves its log as DIR/NAME.log and may fill DIR/NAME; the last lines are a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM, signal

import psutil
import torch

from tests.gpu.needs import GPUS
from toolkit.engine.bench.peers import PEERS

QWEN = ("--model", "qwen3_30b_a3b", "--isl", "1024", "--osl", "128", "--batch", "32", "128", "256")
DEEPSEEK = ("--model", "deepseek_v3_fp8", *QWEN[2:])
LAYERS = "model.hf_config.num_hidden_layers=12"
PAIR = (
    "model=qwen3_30b_a3b", "cluster.device=cuda", "engine.page_size=64", "engine.mem_fraction_static=0.85",
    "engine.max_running_requests=320", "engine.chunked_prefill_size=8192",
    "load.dataset=random", "load.isl=2048", "load.osl=256",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A command of this Python: ``OUT`` in a word is the job's own folder. Without GPUs it has cores of its own."""

    name: str
    gpus: int
    seconds: int  # it is ended after them
    words: tuple[str, ...]


def pytest(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "--basetemp", "OUT/tmp", *words)


def bench(words: Sequence[str], gpus: int, *settings: str) -> tuple[str, ...]:
    return ("-m", "toolkit.engine.bench", *words, "--parallel", f"dep{gpus}", "--device", "cuda", "--out", "OUT/run",
            "--set", *settings)  # fmt: skip


def moving(gpus: int, osl: int, *settings: str) -> tuple[str, ...]:
    return ("-m", "toolkit.engine.bench.migration", "--model", "qwen3_30b_a3b", "--batch", "128", "--osl", str(osl),
            "--parallel", f"dep{gpus}", "--device", "cuda", "--out", "OUT/run", "--set", *settings,
            "engine.ep_num_redundant_experts=16", "engine.eplb_rebalance_layers_per_chunk=1")  # fmt: skip


def jobs(n: int) -> Iterator[Work]:
    """What there is to do on ``n`` GPUs, the dearest first."""
    pair = min(n, 2)
    half = n // 2
    yield Work("loadgen", 0, 240, ("-m", "tests.bench.loadgen", "socket", "rounds=2", "out=OUT/loadgen.json"))
    yield Work("loadgen-aiohttp", 0, 240, ("-m", "tests.bench.loadgen", "aiohttp", "out=OUT/loadgen.json"))
    yield Work("frontend", 0, 120, ("-m", "tests.bench.frontend", "--streams", "1024", "--rounds", "1", "--api-servers",
               "1", "2", "4", "8"))  # fmt: skip
    for backend in ("nvlink", "deepep") if n > 1 else ("allgather",):
        yield Work(f"qwen3-{backend}", n, 240, bench(QWEN, n, f"engine.moe_a2a_backend={backend}"))
    for backend in ("deepep", "nvlink") if n > 1 else ("allgather",):
        yield Work(f"deepseek-{backend}", n, 240, bench(DEEPSEEK, n, f"engine.moe_a2a_backend={backend}", LAYERS))
    eplb = "tests/gpu/test_eplb_gpu.py"
    yield Work("test-eplb-bf16", pair, 300, pytest(eplb, "-s", "-k", "one_gpu or (two_gpus and bf16)"))
    yield Work("test-eplb-fp8", pair, 300, pytest(eplb, "-s", "-k", "not one_gpu and not bf16 and not four_gpus"))
    yield Work("test-disagg", pair, 300, pytest("tests/gpu/test_disagg_gpu.py"))
    engine = "tests/gpu/test_engine.py"
    yield Work("test-engine-one", 1, 300, pytest(engine, "-k", "not several_gpus"))
    yield Work("test-engine", n, 420, pytest(engine, "-k", "several_gpus"))
    yield Work("test-dispatchers", n, 300, pytest("tests/gpu/test_dispatchers.py"))
    yield Work(
        "test-kernels",
        1,
        300,
        pytest("tests/gpu/test_fused.py", "tests/gpu/test_gemms.py", "tests/gpu/test_replica_choice.py"),
    )
    yield Work("kernels", 1, 90, ("-m", "toolkit.engine.bench.kernels", "--out", "OUT/kernels.json"))
    yield Work("expert-tiles", 1, 300, ("-m", "toolkit.engine.bench.expert_tiles", "--out", "OUT/tiles.json"))
    yield Work("attention", 1, 300, ("-m", "toolkit.engine.bench.attention", "--out", "OUT/attention.json",
               "--backends", "triton", "fa3", "varlen", *PEERS))  # fmt: skip
    yield Work("recorder", 1, 90, ("-m", "tests.bench.recorder", "--device", "cuda"))
    yield Work("test-attention", 1, 300, pytest("tests/gpu/test_attention.py",
               "tests/gpu/test_decode_attention.py"))  # fmt: skip
    yield Work("test-layers", pair, 300, pytest("tests/gpu/test_moe_layers.py"))
    yield Work("test-transfers", pair, 200, pytest("tests/gpu/test_transfers.py"))
    yield Work("test-serving", n, 300, pytest("tests/gpu/test_serving.py"))
    if n < 2:
        return
    if n >= 4:
        yield Work("test-eplb-four", 4, 300, pytest(eplb, "-s", "-k", "four_gpus"))
    deepep = "engine.moe_a2a_backend=deepep"
    yield Work("migration", n, 200, moving(n, 300, deepep))
    yield Work("migration-v2", 2, 200, moving(2, 300, deepep))
    yield Work("migration-weighted", 2, 200, moving(2, 300, deepep, "engine.ep_dispatch_algorithm=weighted"))
    yield Work("migration-legacy", 2, 200, moving(2, 300, deepep, "engine.deepep_buffer=legacy"))
    yield Work("migration-nvlink", 2, 200, moving(2, 300, "engine.moe_a2a_backend=nvlink"))
    yield Work("moe", n, 200, ("-m", "toolkit.engine.moe.bench", "--ranks", str(n), "--out", "OUT/moe.json"))
    split = (f"parallel=dep{2 * half}", f"parallel@deploy.prefill.parallel=dep{half}",
             f"parallel@deploy.decode.parallel=dep{half}")  # fmt: skip
    agg = "variants.agg.engine.moe_a2a_backend=nvlink"
    disagg = f"variants.disagg.engine.moe_a2a_backend={'nvlink' if half > 1 else 'allgather'}"
    points = f"load.concurrency=[{','.join(str(half * c) for c in (8, 32, 80, 160))}]"
    launch = ("-m", "toolkit.launch")
    yield Work("disagg-ab", 2 * half, 400,
               (*launch, "+exp=disagg_ab", *PAIR, *split, agg, disagg, points, "cluster.results_dir=OUT"))  # fmt: skip
    yield Work("rates", 2, 200, (*launch, "+exp=rate_match", *PAIR,
               "load.concurrency=[16,64,192]", "cluster.results_dir=OUT"))  # fmt: skip
    yield Work("kv", 2, 120, ("-m", "tests.bench.kv", "--device", "cuda", "--repeats", "15"))


def end(process: subprocess.Popen[bytes]) -> None:
    """A job and all that it started in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, SIGKILL)
    process.wait()


@dataclass
class Host:
    """GPUs and cores that are given to jobs. Cores come in equal shares: one a GPU, one for what needs no GPU."""

    out: Path
    deadline: float
    beside: int = 1
    jobs_on: Counter[int] = field(default_factory=lambda: Counter(dict.fromkeys(range(max(GPUS, 1)), 0)))
    cpu_free: bool = True
    running: dict[subprocess.Popen[bytes], tuple[Work, set[int], float]] = field(default_factory=dict)
    done: list[tuple[str, str, float]] = field(default_factory=list)

    def fits(self, work: Work) -> bool:
        free = [gpu for gpu, jobs in self.jobs_on.items() if jobs < self.beside]
        return len(free) >= work.gpus if work.gpus else self.cpu_free

    def start(self, work: Work) -> None:
        gpus = set(sorted(self.jobs_on, key=lambda gpu: (self.jobs_on[gpu], gpu))[: work.gpus])
        self.jobs_on.update(gpus)
        self.cpu_free = self.cpu_free and work.gpus > 0
        folder = self.out / work.name
        folder.mkdir(parents=True, exist_ok=True)
        words = [word.replace("OUT", str(folder)) for word in work.words]
        shares = sorted(os.sched_getaffinity(0))
        size = len(shares) // (max(GPUS, 1) + 1)
        mine = [shares[s * size + i] for s in ({g + 1 for g in gpus} or {0}) for i in range(size)]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(gpus)))}
        command = ["taskset", "-c", ",".join(map(str, mine)), sys.executable, *words]
        with (self.out / f"{work.name}.log").open("wb") as log:
            log.write(f"$ python {' '.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        self.running[process] = (work, gpus, time.monotonic())
        print(f"{work.name}: started on GPUs {sorted(gpus)}", flush=True)

    def stacks(self, pid: int, name: str) -> None:
        """Where each process of a job stands, at the end of its log."""
        if (spy := shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
            return
        with (self.out / f"{name}.log").open("ab") as log, suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                subprocess.run(
                    [spy, "dump", "--pid", str(process.pid)], stdout=log, stderr=log, timeout=10, check=False
                )

    def collect(self, wait_for: Callable[[], bool]) -> None:
        """Waits until ``wait_for`` holds, ending jobs whose time is up."""
        while not wait_for():
            time.sleep(0.2)
            for process, (work, gpus, since) in list(self.running.items()):
                now = time.monotonic()
                if process.poll() is None and now < min(since + work.seconds, self.deadline):
                    continue
                how = "timed out" if process.poll() is None else f"exit {process.returncode}"
                if process.poll() is None:
                    self.stacks(process.pid, work.name)
                end(process)
                del self.running[process]
                self.jobs_on.subtract(gpus)
                self.cpu_free = self.cpu_free or not work.gpus
                self.done.append((work.name, how, now - since))
                print(f"{work.name}: {how} after {now - since:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu-host"), help="folder for logs and results")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these jobs, in this order")
    parser.add_argument("--minutes", type=float, default=60, help="end what runs then")
    parser.add_argument("--beside", type=int, default=1, metavar="N", help="jobs that may share a GPU")
    parser.add_argument("--list", action="store_true", help="the jobs and their commands, nothing else")
    args = parser.parse_args()
    todo = {work.name: work for work in jobs(GPUS or 1)}
    if unknown := [name for name in args.only if name not in todo]:
        parser.error(f"--only {' '.join(unknown)}: there are {' '.join(todo)}")
    chosen = [todo[name] for name in args.only or todo]
    if args.list or not torch.cuda.is_available():
        for work in chosen:
            print(f"{work.name:20} {work.gpus} GPUs, {work.seconds} s at most: python {' '.join(work.words)}")
        sys.exit(0 if args.list else "no GPU is visible to torch here: nothing was run")
    host = Host(args.out, time.monotonic() + 60 * args.minutes, args.beside)
    signal(SIGTERM, lambda *_: sys.exit("ended from outside"))  # its jobs too, which would hold their GPUs
    try:
        for work in chosen:
            host.collect(lambda work=work: host.fits(work) or time.monotonic() > host.deadline)  # type: ignore[misc]
            if time.monotonic() > host.deadline:
                host.done.append((work.name, "not started: no time left", 0.0))
            else:
                host.start(work)
        host.collect(lambda: not host.running)
    finally:
        for process in host.running:
            end(process)
    print("\n".join(f"{name:20} {how:26} {seconds:6.0f} s" for name, how, seconds in host.done))
    sys.exit(any(how != "exit 0" for _, how, _ in host.done))


if __name__ == "__main__":
    main()
