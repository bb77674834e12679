"""Attempts at one run: taking a run folder up again, without losing or mixing anything.

A run folder holds one deployment under one kind of load, however often it was started. What the loads measured is in
points/ and stays; what belongs to one life of the processes (their logs and states, forward passes, expert counts,
samples) moves to ``attempts/<n>/`` before the next one begins, where readers find it and put it together. The manifest
lists all attempts and what differed between them. Owns the folder's hand-over; what makes a load point the same is
``loadgen/resume.py``'s. Read next: ``run.py``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from toolkit import heartbeat, point_files, records
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping, to_mapping
from toolkit.engine import pulse
from toolkit.launch import provenance_files, share
from toolkit.launch.launcher import STATE_DIR
from toolkit.loadgen import resume
from toolkit.loadgen.options import Options
from toolkit.records.files import write_json
from toolkit.records.status import RunState, read_status, write_status

COMMAND = "command.json"  # inside STATE_DIR
# Of an experiment's keys, those that decide what is measured; load.* has its own list (resume.NO_MATTER).
GROUPS = ("parallel", "engine")
MODEL = ("hf_config", "load_format", "dtype", "seed")
DEPLOY = (
    "mode", "router", "prefill", "decode", "disaggregation_transfer_backend", "disaggregation_handoff", "api_servers",
)  # fmt: skip
CLUSTER = ("device", "gpus_per_node", "cpu_threads_per_rank", "container_image")
PULSES = f"{STATE_DIR}/{pulse.FOLDER}"
MOVED = (records.STEPS, records.NODE_SAMPLES, records.EXPERTS, records.SERVER_METRICS, records.NODES, PULSES,
         records.WORKERS, records.TRANSFERS, provenance_files.FOLDER, share.FOLDER)  # fmt: skip


def deployment_settings(cfg: ExpConfig) -> dict[str, Any]:
    """What of the deployment matters to its figures: no paths, ports, names, accounts."""
    values = to_mapping(cfg)
    chosen = {"model": MODEL, "deploy": DEPLOY, "cluster": CLUSTER}
    flat = {f"{g}.{k}": values[g][k] for g, keys in chosen.items() for k in keys if k in values[g]}
    flat |= {f"{group}.{key}": value for group in GROUPS for key, value in values[group].items()}
    shape = Path(cfg.model.path) / "config.json"
    return flat | {"model.config.json": point_files.file_digest(str(shape)) if shape.is_file() else ""}


def deployment_key(cfg: ExpConfig) -> str:
    return point_files.key_of(deployment_settings(cfg))


def find(cfg: ExpConfig) -> Path | None:
    """The run folder that ``cfg`` goes on with; None: there is none yet, and a new one is begun.

    Raises:
        ValueError: the run still goes on, or its folder holds something else.
    """
    folder = Path(cfg.run_dir).expanduser() if cfg.run_dir else Path(cfg.cluster.results_dir) / cfg.exp / "latest"
    if not (cfg.resume or cfg.run_dir) or not (folder / records.CONFIG).is_file():
        return None
    folder = folder.resolve()
    beat = heartbeat.read(folder)
    if beat is not None and beat.alive:
        raise ValueError(
            f"run_dir={folder} is in use by process {beat.pid} on {beat.host}: wait for its end, or stop it"
        )
    if changed := list(differences(read_config(folder), cfg)):
        raise ValueError(
            f"run_dir={folder} was made with other settings: {'; '.join(changed)}: a run folder holds one deployment "
            "under one kind of load; begin a new run (resume=false, no run_dir), or use the settings it was made with"
        )
    return folder


def read_config(folder: Path) -> ExpConfig:
    """The experiment of a run folder; keys that came later have their defaults."""
    return from_mapping(yaml.safe_load((folder / records.CONFIG).read_text()), ExpConfig)


def differences(before: ExpConfig, now: ExpConfig) -> Iterator[str]:
    """``engine.page_size=16 there, 32 now`` for each setting that matters and differs."""
    one, other = (
        deployment_settings(cfg) | {f"load.{k}": v for k, v in resume.load_settings(cfg.load).items()}
        for cfg in (before, now)
    )
    for name in one:
        if one[name] != other[name]:
            yield f"{name}={one[name]} there, {other[name]} now"


def left_to_do(cfg: ExpConfig, run_dir: Path) -> tuple[int, list[str]]:
    """(how many load points are not done, lines that say so); a search does not know, and has at least one."""
    from toolkit.loadgen.points import points_of  # brings numpy, which `--help` must not wait for

    base = resume.base_settings(Options(**to_mapping(cfg.load), deployment=deployment_key(cfg)))
    points = points_of(cfg.load)
    keys = [point_files.key_of(resume.point_settings(base, point)) for point in points]
    stored = {point.status.key: point.status for point in point_files.read_points(run_dir)}
    lines = [resume.summary(point_files.read_points(run_dir), keys)]
    for point, key in zip(points, keys, strict=True):
        state = stored.get(key)
        if state is None or state.state != "done":
            why = f"{state.state}: {state.reason}" if state else "missing"
            lines.append(f"  {point.name}{f', repeat {point.repeat}' if point.repeat else ''}: {why}")
    return len(lines) - 1 if points else 1, lines


def begin(run_dir: Path, manifest: Mapping[str, Any]) -> int:
    """Makes ``run_dir`` ready for one more life of its processes; returns which it is, from 1.

    Args:
        manifest: of this attempt (``provenance.manifest``); manifest.json holds it, and every attempt in short.
    """
    known = _attempts(run_dir)
    number = len(known) + 1
    if known:
        _put_aside(run_dir, records.attempt_folder(run_dir, number - 1))
        reopen_status(run_dir, "running")
    manifest = {**manifest, **_command(run_dir)}
    entry = {"attempt": number, "started": manifest.get("started"), "changed": _changed(run_dir, number, manifest)}
    write_json(run_dir / records.MANIFEST, {**manifest, "attempts": [*known, entry]})
    return number


def keep_words(run_dir: Path) -> None:
    """Puts a copy of how the last attempt was asked for beside its files, before it is replaced."""
    aside = records.attempt_folder(run_dir, len(_attempts(run_dir)) or 1)
    aside.mkdir(parents=True, exist_ok=True)
    for name in (records.CONFIG, records.OVERRIDES):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, aside / name)


def note(run_dir: Path, **facts: Any) -> None:
    """Adds to the manifest's entry of the attempt that runs (its hosts, how it ended)."""
    path = run_dir / records.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["attempts"][-1] |= facts
    write_json(path, manifest)


def note_end(run_dir: Path, state: str, reason: str) -> None:
    if _attempts(run_dir):
        note(run_dir, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"), state=state, reason=reason)


def _command(run_dir: Path) -> dict[str, Any]:
    """The command line that asked for the run: on Slurm another process's, on another machine."""
    path = run_dir / STATE_DIR / COMMAND
    return {"command": json.loads(path.read_bytes())} if path.exists() else {}


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((run_dir / records.MANIFEST).read_bytes()).get("attempts", [])
    except (OSError, json.JSONDecodeError):
        return []
    return found if isinstance(found, list) else []


def _put_aside(run_dir: Path, aside: Path) -> None:
    """Renames, one by one: whatever ends this in the middle, every file is in one of the two places."""
    for name in (*MOVED, records.MANIFEST):
        if (run_dir / name).exists() or (run_dir / name).is_symlink():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).rename(aside / name)
    states = ("*-[0-9]*.json", "*-args.json", "progress.json")
    for folder, pattern in ((records.LOGS, "*.log"), *((STATE_DIR, pattern) for pattern in states)):
        for file in (run_dir / folder).glob(pattern):
            if not file.name.startswith(("launcher-", "slurm-")):  # their writers have them open
                (aside / folder).mkdir(parents=True, exist_ok=True)
                file.rename(aside / folder / file.name)


def reopen_status(run_dir: Path, state: RunState) -> None:
    """What did not end well is pending again; the load generator puts the points' order right."""
    status = read_status(run_dir)
    status.state, status.reason = state, ""
    for point in status.points:
        if point.state != "done":
            point.state, point.reason = "pending", ""
    write_status(run_dir, status)


def _changed(run_dir: Path, number: int, now: Mapping[str, Any]) -> dict[str, Any]:
    """``git.commit: [before, now]`` for what differs from the attempt before."""
    path = records.attempt_folder(run_dir, number - 1) / records.MANIFEST
    if number == 1 or not path.exists():
        return {}
    before = json.loads(path.read_bytes())
    kinds = ("git", "python", "packages", "host", "gpus", "container")
    old, new = ({k: v for kind in kinds for k, v in _flat(kind, one.get(kind))} for one in (before, now))
    return {k: [old.get(k), new.get(k)] for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield prefix, list(value)
    else:
        yield prefix, value
