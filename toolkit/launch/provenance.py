"""``manifest.json``: on what a run was made: code, versions, machine, environment, command. No secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from toolkit import records

PACKAGES = (
    "wideep-toolkit", "torch", "numpy", "transformers", "safetensors", "hydra-core", "submitit", "aiohttp", "pyzmq",
    "msgspec", "pandas", "pyarrow", "sgl-deep-ep", "sgl-deep-gemm", "sgl-flash-mla", "nixl",
)  # fmt: skip
SECRET_NAME = re.compile(
    r"KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|SIGNATURE|PRIVATE|_PW$|DSN", re.IGNORECASE
)
URL_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")
REMOVED = "<removed>"


def manifest(argv: Sequence[str]) -> dict[str, Any]:
    """Everything about this run's making; values that are not known are null."""
    return {
        "schema_version": records.SCHEMA_VERSION,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(argv),
        "git": git_state(Path(__file__).parent),
        "python": sys.version.split()[0],
        "packages": _versions(),
        "host": _host(),
        "gpus": gpus(),
        "environment": environment(os.environ),
    }


def command(argv: Sequence[str]) -> list[str]:
    """A command line without secrets."""
    return [clean(word) for word in argv]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` in order of name, with the values of secrets removed and logins cut out of URLs."""
    return {
        name: REMOVED if SECRET_NAME.search(name) else URL_LOGIN.sub(rf"\1{REMOVED}@", env[name])
        for name in sorted(env)
    }


def clean(word: str) -> str:
    """A word of a command line without what may be a secret: the value of ``...key=value``, a URL's login."""
    name, equals, _ = word.partition("=")
    if equals and SECRET_NAME.search(name) and not name.endswith(("api_key_env", "tokenizer", "_tokens")):
        return f"{name}={REMOVED}"
    return URL_LOGIN.sub(rf"\1{REMOVED}@", word)


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and whether the working tree differs from it; nulls outside a git checkout."""
    commit = output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    changes = output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit or None, "dirty": None if not commit else bool(changes)}


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU of this machine."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return (output(query) or "").splitlines()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _host() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def output(command: list[str]) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
