"""``python -m toolkit.analysis <command>``: reports, comparisons and exports of run folders, from their files alone.

Owns the command line; what each command does is commands.py's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

EPILOG = """\
examples:
  python -m toolkit.analysis ls                                        every run under results/, and its best point
  python -m toolkit.analysis report results/smoke/latest               charts and report again
  python -m toolkit.analysis compare results/a/latest results/b/latest the difference, with its confidence interval
  python -m toolkit.analysis pareto results/*/latest                   which mapping and load to choose
  python -m toolkit.analysis rates results/rate_match-*/latest         how many decode GPUs a prefill GPU feeds
  python -m toolkit.analysis export results/smoke/latest --format csv  every table of a run
  python -m toolkit.analysis export results/smoke/latest --format vllm as sa-bench and vLLM would have written it
  python -m toolkit.analysis import vllm bench-*.json --gpus 8         results of others as run folders

A run that failed or was interrupted can be read too: what it left is used, and what is missing is said.
The same can be had in Python:
  from toolkit.analysis import Run, Runs
  run = Run("results/smoke/latest"); run.sweep; run.requests; run.experts; run.steps
  Runs.glob("results/*/*").sweep
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 when something named on the command line cannot be used (the rest is still done)."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.do
    try:
        return command(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    from toolkit.analysis import commands

    parser = argparse.ArgumentParser(
        prog="python -m toolkit.analysis",
        description="Tables, charts and reports of runs, from their files alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, do: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = added.add_parser(name, help=text, description=text)
        sub.set_defaults(do=do)
        return sub

    run_help = "run folder: results/<exp>/latest or results/<exp>/<time>"
    sub = add("report", commands.report, "complete sweep.csv, draw charts, write report.html, print a summary")
    sub.add_argument("run", nargs="+", type=Path, help=run_help)

    sub = add("compare", commands.compare, "each further run against the first: differences with 95 %% intervals")
    sub.add_argument("run", nargs="+", type=Path, help=run_help)
    _out(sub, "compare")

    sub = add("pareto", commands.pareto, "tok/s/GPU against tok/s/user over runs: which points no other beats")
    sub.add_argument("run", nargs="+", type=Path, help=run_help)
    _out(sub, "pareto")

    sub = add("rates", commands.rates, "decode GPUs that one prefill GPU feeds, from runs of each load.phase")
    sub.add_argument("run", nargs="+", type=Path, help=f"{run_help}; of both load.phase=prefill and =decode")
    own = "default: load.slo_{}_ms of the first run; 0: no bound"
    sub.add_argument("--ttft-ms", type=float, default=0.0, help=f"bound on the prefill side; {own.format('ttft')}")
    sub.add_argument("--tpot-ms", type=float, default=0.0, help=f"bound on the decode side; {own.format('tpot')}")
    _out(sub, "rates")

    sub = add(
        "export", commands.export, "tables of a run in one format, or its load points as another tool writes them"
    )
    sub.add_argument("run", type=Path, help=run_help)
    formats = ("csv", "parquet", "json", "vllm", "aiperf")
    sub.add_argument(
        "--format", choices=formats, default="csv",
        help="csv, parquet, json: tables; vllm: results_concurrency_*.json as of sa-bench and vLLM bench serve; "
        "aiperf: profile_export_aiperf.json; default: %(default)s",
    )  # fmt: skip
    sub.add_argument("--out", type=Path, help="folder to write into; default: <run>/export")

    sub = add("ls", commands.ls, "all runs: name, state, model, mapping, best point")
    sub.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="default: %(default)s")
    sub.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: %(default)s")

    sub = add("import", commands.import_results, "results of another tool as a run folder that all commands can read")
    sub.add_argument("tool", choices=commands.TOOLS, help="; ".join(f"{k}: {v}" for k, v in commands.TOOLS.items()))
    sub.add_argument("file", nargs="+", type=Path, help="one file a load point, or one dump")
    sub.add_argument("--name", default="imported", help="the run goes to <results>/<name>/<time>; default: %(default)s")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    sub.add_argument("--gpus", type=int, default=0, help="GPUs of the deployment, for tok/s/GPU; 0: not known")
    sub.add_argument("--ep-size", type=int, default=0, help="EP ranks, for expert dumps that do not say")
    return parser


def _out(sub: argparse.ArgumentParser, name: str) -> None:
    default = Path("results") / name
    sub.add_argument("--out", type=Path, default=default, help="folder for the files; default: %(default)s")


if __name__ == "__main__":
    sys.exit(main())
