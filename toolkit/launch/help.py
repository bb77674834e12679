"""``--help``: how to use the launcher, the groups and their choices, every key."""

from __future__ import annotations

from pathlib import Path

from toolkit.config.experiment import GROUPS
from toolkit.config.help import help_text

USAGE = """\
Takes an experiment to a running MoE deployment, loads it, and leaves a folder of charts.

  python -m toolkit.launch +exp=smoke                         the demo: 4 CPU ranks on this machine
  python -m toolkit.launch +exp=smoke parallel=dep2 load.osl=64
  python -m toolkit.launch +exp=dep16 dry_run=true            print the plan, start nothing
  python -m toolkit.launch +exp=dep16                         on Slurm: submit one job and follow it
  python -m toolkit.launch +exp=dep16 emit=sbatch             write its job script, submit nothing
  python -m toolkit.launch -m +exp=dep16 load.osl=64,256      several runs: one allocation, or an array of jobs
  python -m toolkit.launch.jobs                               list, follow, attach, cancel
  python -m toolkit.launch +exp=dep16 cluster=local           rehearse 16 GPUs with 16 small CPU ranks
  python -m toolkit.launch +exp=dep16 resume=true             go on with its newest run: only what is not done there
  python -m toolkit.launch config=results/dep16/latest        the very same experiment again, in a new run folder
  python -m toolkit.launch +exp=smoke --cfg job               the composed experiment, nothing more

An experiment (+exp=NAME) chooses one file of each group; GROUP=CHOICE replaces a choice, GROUP.KEY=VALUE a key.
Results: results/<exp>/<time>/, the newest as results/<exp>/latest; results/README.md says what each file is.
Exit code: 0 done, 1 the run failed, 2 the config is wrong, 130 cancelled."""


def text(conf: Path) -> str:
    """The whole help. ``conf`` is the folder of the config groups."""
    lines = [USAGE, "", "Choices"]
    for group in ("exp", *GROUPS):
        lines.append(f"  {group:<9} {', '.join(sorted(_choices(conf / group), key=_natural))}")
    keys = ["", "Keys, with their defaults (a choice may set others)", "exp=adhoc  name of the experiment"]
    keys += [
        "dry_run=false  print the plan and exit",
        "emit=''  sbatch: make the run folder and the job script in it, print the script, submit nothing",
        "resume=false  go on with the newest run of this experiment: run only what is not done there",
        "run_dir=''  run folder; one that holds a run of this experiment is gone on with; empty: a new one",
        help_text(),
    ]
    return "\n".join([*lines, *keys])


def _choices(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*.yaml")]


def _natural(name: str) -> tuple[str, int]:
    """dep2 before dep16."""
    word = name.rstrip("0123456789")
    return word, int(name[len(word) :] or 0)
