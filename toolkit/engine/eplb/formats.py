"""Files and words that placements and expert counts come in and go out as.

    counts      ours (experts.npz), SGLang's dumps (.pt; modes stat, stat_approx, per_pass), JSON
    placements  init_expert_location: trivial | FILE.pt | FILE.json | JSON; TensorRT-LLM's load balancer YAML

Checks everything it reads and unpickles nothing but tensors. Imports torch only for .pt files.
Sources: SGLang's eplb/expert_distribution.py and expert_location.py; TensorRT-LLM's ``MoeLoadBalancerConfig``.
W: windows, L: layers, E: logical experts, R: slots.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.eplb import maps
from toolkit.engine.eplb.planner import plan
from toolkit.records.experts import read_experts
from toolkit.records.files import replacing

Ints = NDArray[np.int64]

MAP, COUNT = "physical_to_logical_map", "logical_count"


@dataclass(frozen=True)
class Counts:
    """Expert counts of any source.

    Attributes:
        counts_WLE: assignments of each logical expert; a dump of a server that saw nothing is all zero.
        layer_ids: the model's index of each layer.
    """

    counts_WLE: Ints
    layer_ids: tuple[int, ...]

    @property
    def load_LE(self) -> Ints:
        """Sum over windows."""
        total: Ints = self.counts_WLE.sum(0)
        return total


# --- counts -------------------------------------------------------------------------------------------


def read_counts(path: Path) -> Counts:
    """Expert counts from experts.npz, an .npz of one array, an SGLang dump (.pt) or JSON with ``logical_count``.

    Raises:
        ValueError: a file that is none of these, or whose arrays do not fit together.
    """
    if not path.is_file():
        raise ValueError(f"counts={path} is not a file: give experts.npz of a run folder, or a dump of SGLang (.pt)")
    if path.suffix == ".npz":
        return _read_npz(path)
    content = _load_pt(path) if path.suffix == ".pt" else _load_json(path.read_text(), f"counts={path}")
    counts = _counts_of(content, f"counts={path}")
    return Counts(counts, tuple(range(counts.shape[1])))


def _read_npz(path: Path) -> Counts:
    """experts.npz, or a file with one array of counts."""
    name = f"counts={path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            alone = file[file.files[0]] if len(file.files) == 1 else None
    except (OSError, ValueError):  # whose words recommend to unpickle
        raise ValueError(f"{name} is no archive of plain arrays") from None
    if alone is not None:
        counts = _counts_of({COUNT: alone}, name)
        return Counts(counts, tuple(range(counts.shape[1])))
    try:
        experts = read_experts(path)
    except KeyError:
        raise ValueError(
            f"{name} is neither the experts.npz of a run folder nor one array [layers, experts] of counts"
        ) from None
    return Counts(experts.counts, tuple(experts.layer_ids.tolist()))


def write_dump(path: Path, counts_WLE: Ints, balancedness: float | None = None) -> None:
    """SGLang's ``stat`` dump, as rank 0 writes it: logical counts [windows, layers, experts]."""
    import torch

    content = {
        "rank": 0,
        COUNT: torch.from_numpy(np.ascontiguousarray(counts_WLE, np.int64)),
        "average_utilization_rate_over_window": balancedness,
    }
    with replacing(path, "wb") as out:
        torch.save(content, out)


def to_logical(physical_LR: Ints, phy2log_LR: Ints, experts: int) -> Ints:
    """Counts of slots -> counts of their experts, [L, E]."""
    layers = len(physical_LR)
    flat = (phy2log_LR + np.arange(layers)[:, None] * experts).ravel()
    summed = np.bincount(flat, weights=physical_LR.ravel().astype(np.float64), minlength=layers * experts)
    return summed.astype(np.int64).reshape(layers, experts)


def _counts_of(content: Any, name: str) -> Ints:
    if isinstance(content, dict) and "records" in content:  # modes per_pass and per_token
        phy2log = _array(content.get("last_physical_to_logical_map"), 2, f"{name}: last_{MAP}")
        passes = [record.get("global_physical_count") for record in content["records"]]
        experts = int(phy2log.max(initial=-1)) + 1
        logical = [to_logical(_array(one, 2, f"{name}: global_physical_count"), phy2log, experts) for one in passes]
        return np.stack(logical) if logical else np.zeros((0, len(phy2log), experts), np.int64)
    if not isinstance(content, dict) or COUNT not in content:
        raise ValueError(f"{name} has no {COUNT}: give a dump of SGLang's recorder (mode stat) or experts.npz")
    counts = np.asarray(content[COUNT])
    counts = _array(counts[None] if counts.ndim == 2 else counts, 3, f"{name}: {COUNT}")
    if (counts < 0).any():
        raise ValueError(f"{name}: {COUNT} has negative entries; it must hold counts")
    return counts


# --- placements ---------------------------------------------------------------------------------------


def read_placement(
    spec: str, layer_ids: Sequence[int], experts: int, slots: int, gpus: int, groups: int = 1, nodes: int = 1
) -> Ints:
    """The placement that ``init_expert_location`` names, phy2log [L, R].

    Args:
        spec: ``trivial`` (slot r holds expert r % E), a .pt or .json file, or JSON itself. A mapping with
            ``physical_to_logical_map`` is taken as it is; with ``logical_count`` it is planned from.
        layer_ids: the model's index of each MoE layer. A file may have a row for each of these, or one for every
            layer of the model, as SGLang writes it.

    Raises:
        ValueError: a file or JSON that is neither, or that does not fit the model.
    """
    if spec == "trivial":
        return np.tile(np.arange(slots) % experts, (len(layer_ids), 1))
    name = "init_expert_location" if spec.lstrip().startswith("{") else f"init_expert_location={spec}"
    content = _read_spec(spec, name)
    if isinstance(content, dict) and MAP in content:
        phy2log = _rows(_array(content[MAP], 2, f"{name}: {MAP}"), layer_ids, name)
        if phy2log.shape[1] != slots:
            need = phy2log.shape[1] - experts
            raise ValueError(f"{name} has {phy2log.shape[1]} slots, not {slots}: use ep_num_redundant_experts={need}")
        maps.check_phy2log(phy2log, experts, name)
        return phy2log
    if isinstance(content, dict) and COUNT in content:
        load = _rows(_counts_of(content, name).sum(0), layer_ids, name)
        if load.shape[1] != experts:
            raise ValueError(
                f"{name} counts {load.shape[1]} experts, the model has {experts}: use a dump of this model"
            )
        return plan(load, slots, groups, nodes, gpus).phy2log_LR
    raise ValueError(f"{name} has neither {MAP} nor {COUNT}: give one of the two")


def write_placement(path: Path, phy2log_LR: Ints, layer_ids: Sequence[int], layer_updates_per_iter: int = 0) -> None:
    """Writes a placement for the engine its suffix stands for.

    .json and .pt are ``init_expert_location`` of ours and of SGLang: a row for every layer of the model, trivial for
    those without experts. .yaml is TensorRT-LLM's ``moe_config.load_balancer``: ``layer_updates_per_iter`` 0 keeps
    it static, more lets it be adapted online.
    """
    if path.suffix in (".yaml", ".yml"):
        _write_yaml(path, phy2log_LR, layer_ids, layer_updates_per_iter)
        return
    slots, experts = phy2log_LR.shape[1], int(phy2log_LR.max()) + 1
    rows = np.tile(np.arange(slots) % experts, (max(layer_ids) + 1, 1))
    rows[list(layer_ids)] = phy2log_LR
    if path.suffix == ".pt":
        import torch

        with replacing(path, "wb") as out:
            torch.save({MAP: torch.from_numpy(rows)}, out)
    elif path.suffix == ".json":
        with replacing(path, "w") as out:
            json.dump({MAP: rows.tolist()}, out)
            out.write("\n")
    else:
        raise ValueError(
            f"out={path}: the suffix says for whom: .json (ours, SGLang), .pt (SGLang), .yaml (TensorRT-LLM)"
        )


def read_trtllm(path: Path) -> tuple[Ints, tuple[int, ...]]:
    """``initial_global_assignments`` of a load balancer YAML: phy2log [L, R] and the layers' indices."""
    import yaml

    content = yaml.safe_load(path.read_text())
    assignments = content.get("initial_global_assignments") if isinstance(content, dict) else None
    if not isinstance(assignments, dict) or not assignments:
        raise ValueError(f"{path} has no initial_global_assignments: give TensorRT-LLM's load balancer YAML")
    layer_ids = tuple(sorted(assignments))
    return _array([assignments[layer] for layer in layer_ids], 2, str(path)), layer_ids


def _write_yaml(path: Path, phy2log_LR: Ints, layer_ids: Sequence[int], updates: int) -> None:
    lines = [f"num_slots: {phy2log_LR.shape[1]}", f"layer_updates_per_iter: {updates}", "initial_global_assignments:"]
    lines += [f"  {layer}: {json.dumps(row.tolist())}" for layer, row in zip(layer_ids, phy2log_LR)]
    with replacing(path, "w") as out:
        out.write("\n".join(lines) + "\n")


# --- reading ------------------------------------------------------------------------------------------


def _read_spec(spec: str, name: str) -> Any:
    if spec.lstrip().startswith("{"):
        return _load_json(spec, name)
    path = Path(spec).expanduser()
    if path.suffix not in (".pt", ".json"):
        raise ValueError(f"{name} is not known: use trivial, a .pt or .json file, or JSON with {MAP} or {COUNT}")
    if not path.is_file():
        raise ValueError(f"{name} is not a file: give the path of a placement or of a dump, or trivial")
    return _load_pt(path) if path.suffix == ".pt" else _load_json(path.read_text(), name)


def _load_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def _load_pt(path: Path) -> Any:
    import pickle
    import zipfile

    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as tensors and plain values: {reason}") from None


def _array(value: Any, dimensions: int, name: str) -> Ints:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise ValueError(f"{name} must be an array of whole numbers with {dimensions} dimensions")
    return array.astype(np.int64)


def _rows(array: Ints, layer_ids: Sequence[int], name: str) -> Ints:
    if len(array) == len(layer_ids):
        return array
    if len(array) > max(layer_ids):
        return array[list(layer_ids)]
    raise ValueError(
        f"{name} has {len(array)} layers: the model has {len(layer_ids)} MoE layers, up to {max(layer_ids)}"
    )
