"""``provenance/`` of a run folder: what the manifest is too short for, so that a run can be made again exactly.

The packages that were installed, how the code differed from its commit, Slurm's own record of the job, and which image
the engine ran in. Nothing here fails a run: what cannot be found out is left out. Secrets: logins are cut out of URLs;
a diff holds what the user's working tree holds. Read next: ``provenance.py``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.config.cluster import ClusterConfig
from toolkit.launch.provenance import URL_LOGIN, output
from toolkit.records.files import replacing

log = logging.getLogger(__name__)

FOLDER = "provenance"
MOST_DIFF = 5_000_000  # characters; more is no change but another code
WHOLE_BYTES = 1 << 31  # of an image file whose digest is taken whole
END_BYTES = 1 << 26  # of a larger one, at its begin and end


def write(run_dir: Path, code: Path) -> None:
    """Writes what is known. ``code``: a folder of the toolkit's checkout."""
    folder = run_dir / FOLDER
    texts = {"packages.txt": packages(), "code.diff": diff(code), "slurm_job.txt": slurm_job()}
    try:
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            if text:
                with replacing(folder / name, "w") as out:
                    out.write(text)
    except OSError as error:
        log.warning("no %s/: %s", FOLDER, error)


def packages() -> str:
    """Every installed distribution as ``pip freeze`` has it: ``name==version``, or where it was installed from."""
    return "".join(f"{line}\n" for line in sorted(set(_packages()), key=str.lower))


def _packages() -> Iterator[str]:
    for one in importlib.metadata.distributions():
        name = one.metadata["Name"]
        if not name:
            continue
        source = one.read_text("direct_url.json")
        if not source:
            yield f"{name}=={one.version}"
            continue
        told: dict[str, Any] = json.loads(source)
        commit = told.get("vcs_info", {}).get("commit_id", "")
        url = URL_LOGIN.sub(r"\1", told.get("url", ""))
        yield f"{name} @ {url}{f'@{commit}' if commit else ''}  # {one.version}"


def diff(code: Path) -> str:
    """The tracked files' difference to the commit, and the names of new ones; empty for a clean checkout."""
    git = ["git", "-C", str(code)]
    changes = output([*git, "diff", "HEAD", "--binary"]) or ""
    new = output([*git, "ls-files", "--others", "--exclude-standard", "--full-name", ":/"]) or ""
    if len(changes) > MOST_DIFF:
        changes = f"{changes[:MOST_DIFF]}\n# cut off: {len(changes)} characters in all"
    listed = "".join(f"# not tracked: {name}\n" for name in new.splitlines())
    return f"{listed}{changes}\n" if listed or changes else ""


def slurm_job() -> str:
    """``scontrol show job`` of the allocation this runs in; empty outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    return URL_LOGIN.sub(r"\1", output(["scontrol", "-dd", "show", "job", job]) or "") if job else ""


def container(cluster: ClusterConfig) -> dict[str, Any]:
    """Which image the engine runs in, as exactly as can be known: its digest, or that of its file; empty for none."""
    image = cluster.container_image
    around = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER") or ""
    if not image and not around:
        return {"inside": "docker"} if Path("/.dockerenv").exists() else {}
    known: dict[str, Any] = {"image": image or around, "runtime": cluster.container_runtime if image else "apptainer"}
    _, at, digest = known["image"].rpartition("@")
    path = Path(known["image"]).expanduser()
    if at and digest.startswith("sha256:"):
        known["digest"] = digest
    elif path.is_file():
        known |= _file(path)
    return known


def _file(path: Path) -> dict[str, Any]:
    stat = path.stat()
    told: dict[str, Any] = {"bytes": stat.st_size, "modified": stat.st_mtime}
    with path.open("rb") as file:
        if stat.st_size <= WHOLE_BYTES:
            return told | {"digest": f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"}
        begin = file.read(END_BYTES)
        file.seek(-END_BYTES, os.SEEK_END)
        ends = hashlib.sha256(begin + file.read(END_BYTES)).hexdigest()
    return told | {"ends_digest": f"sha256:{ends}"}  # of its first and last 64 MiB: tens of GB take minutes
