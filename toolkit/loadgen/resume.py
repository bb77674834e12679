"""Taking a sweep up again: which of its points a folder has already, and what it must not be mixed with.

Owns what matters to a point's figures (its settings, whose hash is its key). Files are ``point_files.py``'s.
Read next: ``sweep.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import point_files
from toolkit.point_files import StoredPoint

if TYPE_CHECKING:
    from toolkit.config.load import LoadConfig
    from toolkit.loadgen.options import Options
    from toolkit.loadgen.points import LoadPoint

# Keys of load.* that choose points, name places, or change what is kept of a request and not what it measures.
NO_MATTER = frozenset(
    ("concurrency", "request_rate", "repeat", "search", "max_concurrency", "dataset_path", "image", "workers", "nodes",
     "pin", "strict", "scrape", "scrape_urls", "scrape_interval_s", "timeout_s", "gone_s", "slo_ttft_ms", "slo_itl_ms",
     "slo_tpot_ms", "slo_e2e_ms", "slo_share", "record_text", "record_raw", "max_failed_share",
     "max_wrong_length_share", "max_client_verdict")
)  # fmt: skip


def load_settings(load: LoadConfig) -> dict[str, Any]:
    """What of a sweep's options matters to the figures of every point; files by their content."""
    from toolkit.config.load import LoadConfig

    known = {field.name for field in dataclasses.fields(LoadConfig)} - NO_MATTER
    values = {name: getattr(load, name) for name in sorted(known)}
    return values | {name: point_files.file_digest(getattr(load, name)) for name in ("dataset_path", "image")}


def point_settings(base: Mapping[str, Any], point: LoadPoint) -> dict[str, Any]:
    """Everything that the key of ``point`` is the hash of."""
    own = {name: getattr(point, name) for name in ("concurrency", "request_rate", "warmup", "measured", "repeat")}
    return {**base, "point": own}


def base_settings(options: Options) -> dict[str, Any]:
    """What holds for every point: ``deployment`` stands for the server (the launcher's hash, or the model's name)."""
    return {"deployment": options.deployment or options.model, "load": load_settings(options)}


def stored_points(options: Options, base: Mapping[str, Any]) -> list[StoredPoint]:
    """What ``options.out`` holds; empty where there is no folder, or nothing in it.

    Raises:
        ValueError: it holds a sweep of something else, or one that this is not said to go on with.
    """
    from toolkit.records import REQUESTS

    folder = Path(options.out)
    if not options.out or not folder.is_dir():
        return []
    stored = point_files.read_points(folder)
    if not options.resume and (stored or (folder / REQUESTS).exists()):
        raise ValueError(
            f"out={folder} holds the results of a sweep already ({point_files.FOLDER}/ or {REQUESTS}): give another "
            "folder, or resume=true to run only what is not done there"
        )
    if changed := sorted({line for point in stored for line in differences(point.settings, base)}):
        raise ValueError(
            f"out={folder} holds points that were measured otherwise: {'; '.join(changed)}: one folder holds one "
            "deployment under one kind of load; give another folder, or the settings it was made with"
        )
    return stored


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """``osl=32 there, 64 now`` for each setting that differs."""
    if before.get("deployment") != now["deployment"]:
        yield f"deployment={before.get('deployment')} there, {now['deployment']} now"
    load = before.get("load", {})
    for name, value in now["load"].items():
        if name in load and load[name] != value:  # a key that came later had its default
            yield f"{name}={load[name]} there, {value} now"


def summary(stored: Sequence[StoredPoint], keys: Sequence[str]) -> str:
    """``2 done, 1 invalid, 1 missing``: the states of the points with ``keys`` (or others that are there)."""
    states = {point.status.key: point.status.state for point in stored}
    found = [states.get(key, "missing") for key in keys] + [s for key, s in states.items() if key not in keys]
    order = ("done", "invalid", "failed", "cancelled", "missing")
    return ", ".join(f"{found.count(state)} {state}" for state in order if state in found)
