"""Debian 13 in a folder, for its Slurm 24.11: ``--segment`` and topology/block are not in Debian 12's 22.05.

``python -m tests.slurm.debian13 make`` fetches it (debootstrap, minutes, once); ``enter`` gives it this machine's
/proc, /dev, /tmp and the paths that the toolkit's Python lies under, so that the same virtual environment runs in it;
``leave`` takes them away again. Read next: ``cluster.py``, whose programs can come from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(os.environ.get("WIDEEP_DEBIAN13") or "/var/tmp/wideep-debian13")
MIRROR = os.environ.get("WIDEEP_DEBIAN_MIRROR") or "http://deb.debian.org/debian"
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = "slurm-wlm,munge,iproute2,libffi8,libssl3t64,libsqlite3-0"


def make() -> None:
    """Fetches it, unless it is there. Raises ``RuntimeError`` where it cannot be had."""
    if (ROOT / "usr/sbin/slurmctld").exists():
        return
    if shutil.which("debootstrap") is None:
        raise RuntimeError("debootstrap is not installed: apt-get install debootstrap")
    part = ROOT.with_name(f"{ROOT.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", str(part), MIRROR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"debootstrap could not fetch Debian 13 from {MIRROR}: {done.stdout[-500:]}")
    part.rename(ROOT)


def enter() -> None:
    """Makes what a job needs visible inside. Raises ``RuntimeError`` when it is missing, or no home for our Python."""
    if not (ROOT / "usr/sbin/slurmctld").exists():
        raise RuntimeError(f"no Debian 13 in {ROOT}: make test-slurm-segment fetches it")
    leave()
    for path in _shared():
        target = ROOT / path.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind", "--make-rslave", str(path), str(target)], check=True)
    probe = [
        "chroot",
        str(ROOT),
        "env",
        f"PYTHONPATH={REPOSITORY}",
        sys.executable,
        "-c",
        "import toolkit.launch.inside",
    ]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        leave()
        raise RuntimeError(f"{sys.executable} does not run inside Debian 13: {done.stderr.strip()[-300:]}")


def leave() -> None:
    for path in reversed(list(_shared())):
        subprocess.run(
            ["umount", "--recursive", "--lazy", str(ROOT / path.relative_to("/"))], capture_output=True, check=False
        )


def _shared() -> Iterator[Path]:
    """Folders of this machine that are seen inside, none within another."""
    wanted = [Path(p) for p in ("/proc", "/sys", "/dev", "/tmp", "/run", sys.prefix, sys.base_prefix)]
    wanted += [REPOSITORY, Path(sys.executable).resolve().parents[1]]
    tops = [p for p in dict.fromkeys(wanted) if not any(other in p.parents for other in wanted)]
    system = [p for p in tops if p == Path("/usr")]  # its own /usr it keeps: a system Python is not for it
    yield from (p for p in tops if p not in system)


if __name__ == "__main__":
    try:
        {"make": make, "enter": enter, "leave": leave}[sys.argv[1]]()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
