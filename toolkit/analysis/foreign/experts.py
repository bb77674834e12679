"""Expert counts of SGLang and TensorRT-LLM -> ``ExpertCounts``.

Owns the two formats. Neither keeps the time of its windows: windows are numbered seconds from the file's own time, so
that charts over the load show all of them. Read next: tensors.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.analysis.foreign.tensors import read_tensors
from toolkit.records.experts import ExpertCounts


def sglang(path: Path, ep_size: int) -> ExpertCounts:
    """``expert_distribution_recorder_*.pt`` of modes ``stat`` and ``per_pass``; a bare ``logical_count`` too.

    Raises:
        ValueError: not such a file, or ``ep_size`` is missing or does not divide the experts.
    """
    data = read_tensors(path)
    if not isinstance(data, dict):
        raise ValueError(f"file={path} holds a {type(data).__name__}, not SGLang's dict")
    if "logical_count" in data:
        counts = np.asarray(data["logical_count"], np.int64)
        counts = counts[None] if counts.ndim == 2 else counts
        placement = None
    elif "records" in data and "last_physical_to_logical_map" in data:
        placement = np.asarray(data["last_physical_to_logical_map"], np.int32)
        counts = np.stack([_logical(record, placement, path) for record in _passes(data["records"], path)])
    else:
        raise ValueError(f"file={path} has keys {', '.join(map(str, data))}: logical_count or records are needed")
    return _counts(counts, placement, ep_size, path)


def trtllm(path: Path, ep_size: int) -> ExpertCounts:
    """A folder of ``EXPERT_STATISTIC_PATH``: ``meta_info.json`` and ``rank*.safetensors`` with ``{iter}_{layer}``.

    Raises:
        ValueError: not such a folder, ranks that do not fit, or ``ep_size`` as in ``sglang``.
    """
    from safetensors.numpy import load_file

    files = sorted(path.glob("rank*.safetensors"))
    if not files or not (path / "meta_info.json").exists():
        raise ValueError(f"file={path} is not a folder with meta_info.json and rank*.safetensors")
    experts = int(json.loads((path / "meta_info.json").read_text(encoding="utf-8"))["num_experts"])
    total: dict[tuple[int, int], Any] = {}
    for file in files:
        for name, values in load_file(file).items():
            iteration, _, layer = name.partition("_")
            if not (iteration.isdigit() and layer.isdigit()) or values.shape != (experts,):
                raise ValueError(f"file={file}: {name} {values.shape} is not <iteration>_<layer> of {experts} experts")
            key = int(iteration), int(layer)
            total[key] = total.get(key, 0) + values.astype(np.int64)
    iterations, layers = sorted({i for i, _ in total}), sorted({layer for _, layer in total})
    counts = np.zeros((len(iterations), len(layers), experts), np.int64)
    for (iteration, layer), values in total.items():
        counts[iterations.index(iteration), layers.index(layer)] = values
    return _counts(counts, None, ep_size or len(files), path, np.array(layers, np.int32))


def _passes(found: Any, path: Path) -> list[dict[str, Any]]:
    """Records of ``per_pass``, which rank 0 sums over ranks or each rank keeps for itself."""
    usable = [record for record in found if isinstance(record, dict) and "global_physical_count" in record]
    if not usable:
        raise ValueError(f"file={path} is of mode per_token or empty: record with mode stat or per_pass")
    return usable


def _logical(record: dict[str, Any], placement_LP: np.ndarray, path: Path) -> np.ndarray:
    """Counts of slots -> of logical experts."""
    physical = np.asarray(record["global_physical_count"], np.int64)
    if physical.shape != placement_LP.shape:
        raise ValueError(f"file={path}: counts {physical.shape} and placement {placement_LP.shape} differ in shape")
    logical = np.zeros((len(physical), int(placement_LP.max()) + 1), np.int64)
    for layer, slots in enumerate(placement_LP):
        np.add.at(logical[layer], slots, physical[layer])
    return logical


def _counts(
    counts: np.ndarray, placement: np.ndarray | None, ep_size: int, path: Path, layers: np.ndarray | None = None
) -> ExpertCounts:
    if counts.ndim != 3:
        raise ValueError(f"file={path}: counts have shape {counts.shape}, not [windows, layers, experts]")
    ids = np.arange(counts.shape[1], dtype=np.int32) if layers is None else layers
    used = counts.sum((0, 2)) > 0  # SGLang gives dense layers rows of zeros
    counts, ids = counts[:, used], ids[used]
    if placement is None:
        placement = np.tile(np.arange(counts.shape[2], dtype=np.int32), (counts.shape[1], 1))
    else:
        placement = placement[used]
    slots = placement.shape[1]
    if ep_size < 1 or slots % ep_size:
        raise ValueError(f"ep_size={ep_size} does not divide {slots} slots of {path}: give --ep-size, a divisor of it")
    begin = path.stat().st_mtime - len(counts) + np.arange(len(counts), dtype=np.float64)
    return ExpertCounts(counts, np.stack([begin, begin + 1], axis=1), placement[None], begin[:1], ids, ep_size)
