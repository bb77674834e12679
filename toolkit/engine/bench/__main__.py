"""Times one rank group without HTTP, and sets the floor of the same steps beside it.

    python -m toolkit.engine.bench --model qwen3_30b_a3b --parallel dep2 --isl 1024 --osl 128 --batch 32 128 256

Starts one process a rank on this machine, gives each DP rank a batch of equal random prompts, and times every step of
prefill and decode through the engine's own scheduler, pipeline and graphs. Leaves a folder: ``bench.md`` (the table),
``bench.json`` (figures), ``rank-<R>.json`` (every step), ``kernels.csv``, Chrome traces and logs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping
from toolkit.config.resolve import resolve
from toolkit.engine.arch import read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.bench.rank import Job, run
from toolkit.engine.dims import ParallelDims

CONF = Path(__file__).parents[3] / "conf"


def arguments(
    argv: Sequence[str], prog: str = "python -m toolkit.engine.bench", about: str = __doc__
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="name in conf/model, or a yaml file like those")
    parser.add_argument("--parallel", default="dep1", help="name in conf/parallel: dep2, tep4, ...")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where there is one"
    )
    parser.add_argument("--isl", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--osl", type=int, default=128, help="output tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 256], help="requests a DP rank, a point each")
    parser.add_argument("--out", default="", help="folder to make; default: results/bench/<time>")
    parser.add_argument("--profile-steps", type=int, default=8, help="decode steps profiled a point; 0: none")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE",
        help="keys of the experiment config: engine.page_size=64 model.hf_config.num_hidden_layers=12; "
        "`python -m toolkit.launch --help` lists them",
    )  # fmt: skip
    return parser.parse_args(argv)


def make_job(args: argparse.Namespace) -> Job:
    """The job that the arguments describe.

    Raises:
        ValueError: an unknown name or key, or shapes and degrees that do not fit.
    """
    values: dict[str, Any] = {
        "model": _yaml("model", args.model),
        "parallel": _yaml("parallel", args.parallel),
        "engine": _engine(args),
        "cluster": {"device": args.device},
    }
    for item in args.set:
        key, found, value = item.partition("=")
        if not found or "." not in key:
            raise ValueError(f"--set {item}: write group.key=value, for instance engine.page_size=64")
        *path, last = key.split(".")
        into = values
        for name in path:
            into = into.setdefault(name, {})
        into[last] = _scalar(value)
    cfg = resolve(from_mapping(values, ExpConfig))
    dims = ParallelDims.of(cfg.parallel)
    errors = check(read_arch(cfg.model), dims, cfg.engine)
    if errors:
        raise ValueError("\n".join(errors))
    return Job(
        cfg.model, cfg.parallel, cfg.engine, cfg.cluster.device, args.isl, args.osl, args.batch, "", "127.0.0.1", 0,
        args.profile_steps, args.temperature,
    )  # fmt: skip


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """Engine options that fit the load: room for every request, prompts never found in the cache."""
    most, length = max(args.batch), args.isl + args.osl
    page = 64
    return {
        "page_size": page,
        "max_running_requests": most,
        "max_total_tokens": most * (-(-length // page) + 1) * page,
        "context_length": length,
        "chunked_prefill_size": max(16384, most),
        "disable_radix_cache": True,
        "expert_distribution_recorder_mode": None,
    }


def _yaml(group: str, name: str) -> dict[str, Any]:
    import yaml

    file = Path(name) if name.endswith(".yaml") else CONF / group / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in (CONF / group).glob("*.yaml")))
        raise ValueError(f"--{group} {name}: {file} does not exist; use a yaml file, or one of: {known}")
    own: dict[str, Any] = yaml.safe_load(file.read_text())
    values: dict[str, Any] = {}
    for base in own.pop("defaults", []):  # as Hydra composes them; `defaults` itself is the dataclass
        if base not in ("defaults", "_self_"):
            values = _merge(values, _yaml(group, base))
    return _merge(values, own)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, dict by dict."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _scalar(value: str) -> Any:
    import yaml

    return yaml.safe_load(value)


def main(argv: Sequence[str] | None = None) -> int:
    return bench(arguments(sys.argv[1:] if argv is None else argv), run, _report)


def bench(
    args: argparse.Namespace, run: Callable[[Job, int], None], report: Callable[[Job, Path], None], suffix: str = ""
) -> int:
    """Runs all ranks of what ``args`` ask for in a new folder, then ``report``; the exit code.

    Args:
        run: one rank's part, in a process of its own.
        suffix: of the folder's name, where ``args`` give none.
    """
    try:
        job = make_job(args)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    folder = Path(args.out or f"results/bench/{time.strftime('%Y%m%d-%H%M%S')}{suffix}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.json"):
        old.unlink()
    job = msgspec.structs.replace(job, folder=str(folder.absolute()), port=free_port())
    (folder / "config.json").write_text(json.dumps(msgspec.to_builtins(job), indent=1))
    failed = run_ranks(job, run)
    if failed:
        sys.stderr.write(f"rank {failed[0]} failed: see {folder}/rank-{failed[0]}.log and the output above\n")
    if not failed or all((folder / f"rank-{rank}.json").exists() for rank in range(job.parallel.tp_size)):
        report(job, folder)  # of a run that failed: what all ranks had done
    return int(bool(failed))


def run_ranks(job: Job, run: Callable[[Job, int], None]) -> list[int]:
    """One process a rank; the ranks that failed."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run, args=(job, rank)) for rank in range(job.parallel.tp_size)]
    for process in processes:
        process.start()
    failed: list[int] = []
    while not failed and any(p.is_alive() for p in processes):
        for rank, process in enumerate(processes):
            process.join(0.2)
            if process.exitcode:
                failed.append(rank)
    for process in processes:
        if failed:
            process.kill()  # the others wait for it in a collective
        process.join()
    return failed


def _report(job: Job, folder: Path) -> None:
    from toolkit.engine.bench.rank import RankResult
    from toolkit.engine.bench.report import figures, kernels_csv, text
    from toolkit.engine.bench.roofline import Roofline

    results = [
        msgspec.json.decode((folder / f"rank-{rank}.json").read_bytes(), type=RankResult)
        for rank in range(job.parallel.tp_size)
    ]
    arch, dims = read_arch(job.model), ParallelDims.of(job.parallel)
    roofline = Roofline(arch, dims, job.engine, job.model.dtype, job.device)
    rows = figures(job, results, roofline)
    (folder / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    (folder / "kernels.csv").write_text(kernels_csv(job, results))
    report = text(job, results, rows)
    (folder / "bench.md").write_text(report)
    sys.stdout.write(f"{report}\n{folder}\n")


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
