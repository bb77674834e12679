"""``python -m toolkit.analysis report RUN``: (re)draws the charts and the report of a run folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """\
examples:
  python -m toolkit.analysis report results/smoke/latest
  python -m toolkit.analysis report results/smoke/*/

A run that failed or was interrupted can be reported too: what it left is used, and the report says what is missing.
The same can be had in Python:
  from toolkit.analysis import Run
  run = Run("results/smoke/latest"); run.sweep; run.requests; run.experts
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 when a folder is not a run folder (the others are still reported)."""
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.analysis",
        description="Charts and report of finished runs, from their files alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    report = commands.add_parser(
        "report",
        help="complete sweep.csv, draw charts/*.png, write report.html, print a summary",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("run", nargs="+", type=Path, help="run folder: results/<exp>/latest or results/<exp>/<time>")
    options = parser.parse_args(arguments)

    from toolkit.analysis.finish import finish_run
    from toolkit.records import REPORT

    code = 0
    for folder in options.run:
        try:
            table = finish_run(folder)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            code = 2
        else:
            sys.stdout.write(f"{table}report: {folder / REPORT}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
