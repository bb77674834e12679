"""``python -m toolkit.launch +exp=smoke``: compose -> resolve -> check -> run, or print with dry_run=true.

Hydra composes the config and nothing more: the run happens after it has returned, so that errors are told in our
words. Whatever is slow to import is imported after the config is known to be sound. Read next: ``run.py``.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.config.compose import from_omegaconf, read_saved, register_hydra_defaults, variants
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import explain_override
from toolkit.config.resolve import resolve

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.launch.submit import Experiment

CONF = Path(__file__).resolve().parents[2] / "conf"
USER_ERROR = 2
SAVED = "config="


def main() -> int:
    """Returns the exit code: 0 done, 1 the run failed, 2 a user's mistake, 130 cancelled."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        from toolkit.launch import help

        print(help.text(CONF))  # noqa: T201
        return 0
    set_up_logging()
    saved = [word for word in words if word.startswith(SAVED)]
    if saved:
        try:
            return launch([experiment_again(saved[-1].removeprefix(SAVED), [w for w in words if w not in saved])])
        except (ValueError, OSError) as error:
            return _refuse(str(error).splitlines())
    mistakes = [mistake for word in words if (mistake := explain(word))]
    if mistakes:
        return _refuse(mistakes)
    try:
        with tempfile.TemporaryDirectory(prefix="hydra-") as scratch:
            if "-m" in words:  # Hydra's parser wants its options before the overrides; people do not
                # what its sweeper leaves behind would lie in the user's folder
                others = (word for word in words if word != "-m")
                sys.argv[1:] = ["--multirun", *others, f"hydra.sweep.dir={scratch}"]
            composed = compose()
    except SystemExit as error:  # Hydra has printed why
        return USER_ERROR if error.code == 1 else int(error.code or 0)
    return launch(composed)


def experiment_again(path: str, overrides: list[str]) -> tuple[Any, list[str]]:
    """The experiment of a run folder's config.yaml, every key as it was, and what ``overrides`` change of it."""
    file = Path(path).expanduser()
    file = file / "config.yaml" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"config={path} is not there: give a run folder, or the config.yaml in one")
    if mistakes := [mistake for word in overrides if (mistake := explain(word))]:
        raise ValueError("\n".join(mistakes))
    return read_saved(file, overrides), overrides


def explain(word: str) -> str | None:
    """Why a word of the command line cannot be right, or None."""
    if nodes := re.match(r"^(cluster\.(?:nodelist|exclude))=([^'\"]*\[.*)", word):
        return f"{word}: brackets need quotes of their own: \"{nodes[1]}='{nodes[2]}'\""
    top = re.match(r"^\+{0,2}(\w+)=", word)
    known = list(ExpConfig.__dataclass_fields__)
    if top and top[1] not in known:
        close = difflib.get_close_matches(top[1], known, n=1)
        return f"{top[1]} is not a config key; " + (
            f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        )
    return explain_override(word)


def compose() -> list[tuple[Any, list[str]]]:
    """(config, overrides) of each job of the command line; none for ``--cfg job`` and the like, which only print."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    register_hydra_defaults()
    composed: list[tuple[Any, list[str]]] = []

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def keep(node: Any) -> None:
        composed.extend(variants(node, list(HydraConfig.get().overrides.task)))

    keep()
    return composed


def launch(composed: Sequence[tuple[Any, list[str]]]) -> int:
    """Experiments, from what Hydra composed to the exit code. All are checked before the first is begun."""
    from rich.console import Console

    from toolkit.launch import check
    from toolkit.launch.submit import Experiment

    experiments, errors = [], []
    for node, overrides in composed:
        try:
            cfg = resolve(from_omegaconf(node), explicit=override_names(overrides))
        except ValueError as error:
            errors += str(error).splitlines()
            continue
        errors += check.check(cfg)
        experiments.append(Experiment(cfg, overrides))
    if errors:
        return _refuse(dict.fromkeys(errors))
    try:
        return begin(experiments, Console(), Console(stderr=True)) if experiments else 0
    except ValueError as error:
        return _refuse(str(error).splitlines())


def begin(experiments: Sequence[Experiment], out: Console, console: Console) -> int:
    """Shows, emits, submits or runs checked experiments; returns the exit code."""
    first = experiments[0].cfg
    if first.dry_run:
        for experiment in experiments:
            show_plan(experiment.cfg, out)
        return 0
    if first.emit == "sbatch":
        from toolkit.launch.submit import prepare

        for job in prepare(experiments):
            sys.stdout.write(job.script.read_text())
            print(f"Submit it with: sbatch {job.script}", file=sys.stderr)  # noqa: T201
        return 0
    elsewhere = [e for e in experiments if e.cfg.cluster.launcher == "slurm" and "SLURM_JOB_ID" not in os.environ]
    if elsewhere:
        from toolkit.launch.follow import follow
        from toolkit.launch.submit import submit

        run_dirs = submit(elsewhere, console)
        return follow(run_dirs, console) if first.cluster.follow else 0
    return run_here(experiments, console)


def run_here(experiments: Sequence[Experiment], console: Console) -> int:
    """Runs all, on this machine or in this allocation; the worst exit code. Only a cancelled run ends the others.

    Those of one deployment come one after the other and share its processes.
    """
    from toolkit.launch.run import EXIT_CODES, run
    from toolkit.launch.standing import Standing, arranged

    worst = 0
    ordered = [experiment for group in arranged(experiments, lambda e: e.cfg) for experiment in group]
    with Standing() as standing:
        for experiment, following in zip(ordered, [*ordered[1:], None]):
            standing.expect(following.cfg if following else None)
            code = run(experiment.cfg, experiment.overrides, console, standing=standing)
            worst = max(worst, code)
            if code == EXIT_CODES["cancelled"]:
                break
    return worst


def show_plan(cfg: ExpConfig, console: Any) -> None:
    """What a run of ``cfg`` would start, with names in place of what only the run can know."""
    from toolkit.launch import ports
    from toolkit.launch.adapters import adapters
    from toolkit.launch.check_model import memory
    from toolkit.launch.launcher import Node, with_environment
    from toolkit.launch.plan import num_ports, plan
    from toolkit.launch.pools import worker_pools
    from toolkit.launch.show import show

    local = cfg.cluster.launcher == "local"
    base = cfg.cluster.port or (ports.free_range(num_ports(cfg)) if local else ports.SLURM_BASE)
    deployment = plan(cfg, base)
    hosts = ["127.0.0.1"] if local else [f"node{i}" for i in range(deployment.num_nodes)]
    run_dir = Path(cfg.cluster.results_dir).absolute() / cfg.exp / "<time>"
    nodes = [Node(host, base) for host in hosts]
    specs = with_environment(adapters()[cfg.engine.backend](deployment, cfg, hosts, run_dir).specs, cfg, nodes)
    by_pool = {pool.name: memory(pool.view(cfg)) for pool in worker_pools(cfg)}
    show(console, cfg, deployment, specs, by_pool)


def override_names(overrides: Collection[str]) -> set[str]:
    """What the user named: ``+exp=dep16``, ``load.osl=8`` -> ``exp``, ``load.osl``."""
    return {word.lstrip("+~").partition("=")[0] for word in overrides}


def _refuse(errors: Iterable[str]) -> int:
    for error in errors:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return USER_ERROR


def set_up_logging() -> None:
    """Messages as plain lines on stderr; long values (a whole hf_config) are cut."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line, newline, traceback = self.format(record).partition("\n")
            short = line if len(line) <= 160 else f"{line[:157]}..."
            sys.stderr.write(f"{short}{newline}{traceback}\n")  # looked up now: rich replaces it while bars are shown

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Lines()])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before anything was started; a run deals with it itself
        sys.exit(130)
