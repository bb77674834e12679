"""Results of other tools as run folders: requests or sweep rows of benchmarks, expert counts of engines.

Owns the run folder that an import makes; what each format says is benchmarks.py's and experts.py's. What a format does
not say stays NaN or empty: nothing is guessed. ``manifest.json`` names the tool and the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toolkit import records
from toolkit.analysis.foreign.parts import Imported
from toolkit.records.experts import write_experts
from toolkit.records.files import write_json
from toolkit.records.requests import write_requests
from toolkit.records.status import PointStatus, RunStatus, write_status
from toolkit.records.sweep import write_sweep

__all__ = ["Imported", "import_run"]


def import_run(
    tool: str, files: Sequence[Path], results: Path, name: str = "imported", gpus: int = 0, ep_size: int = 0
) -> Path:
    """Makes a run folder ``<results>/<name>/<time>`` of what ``files`` hold and returns it.

    Raises:
        ValueError: an unknown tool, or a file that is not of its format; nothing is written then.
        OSError: a file cannot be read.
    """
    imported = _read(tool, files, ep_size)
    rows = imported.sweep_rows(gpus)
    folder = records.new_run_folder(results, name)
    points = [PointStatus(int(row["concurrency"]), "done") for row in rows]
    write_status(folder, RunStatus("done", f"imported from {tool}", points))
    if imported.requests:
        write_requests(folder, imported.requests)
    if rows:
        write_sweep(folder, rows)
    if imported.experts is not None:
        write_experts(folder / records.EXPERTS, imported.experts)
    config = {"exp": name, "model": {"name": imported.model}, "load": imported.load}
    write_json(folder / records.CONFIG, config)  # JSON is YAML
    write_json(folder / records.PLAN, {"num_gpus": gpus} if gpus else {})
    manifest = {"imported_from": tool, "files": [path.name for path in files], "notes": imported.notes}
    write_json(folder / records.MANIFEST, manifest)
    return folder


def _read(tool: str, files: Sequence[Path], ep_size: int) -> Imported:
    from toolkit.analysis.foreign import benchmarks, experts

    readers = {"vllm": benchmarks.vllm, "sglang": benchmarks.sglang, "aiperf": benchmarks.aiperf}
    dumps = {"sglang-experts": experts.sglang, "trtllm-experts": experts.trtllm}
    if tool not in readers | dumps:
        raise ValueError(f"tool={tool!r} is not known: use one of {', '.join((*readers, *dumps))}")
    if tool in dumps:
        if len(files) != 1:
            raise ValueError(f"file={[str(f) for f in files]}: one dump at a time")
        return Imported(experts=dumps[tool](files[0], ep_size))
    imported = Imported()
    for path in files:
        try:
            readers[tool](path, imported)
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"file={path} is not a result of {tool}: {what}") from error
    return imported
