"""Where weights come from: safetensors folders, read by slice, or seeded random ones.

A model asks for each tensor it owns by its checkpoint name, its full shape and the part it wants; nothing else is
read. Knows nothing of models. Read next: ``models/mixtral.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` equal parts along ``dim``."""

    dim: int
    index: int
    count: int

    def of(self, size: int) -> slice:
        assert size % self.count == 0, f"{size} rows do not divide into {self.count}"
        part = size // self.count
        return slice(self.index * part, (self.index + 1) * part)


class Weights(Protocol):
    """Source of a model's tensors."""

    def get(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tensor ``name`` of full ``shape`` (or its ``shard``) on the model's device, in ``dtype`` or the model's."""
        ...


class SafetensorsWeights:
    """A Hugging Face folder. Reads only the slices that are asked for.

    Args:
        folder: holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
        progress: called after each tensor with the bytes made so far.

    Raises:
        ValueError: no checkpoint in the folder; from ``get``: a missing tensor, or one of another shape.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: str, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.progress = progress
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            self._where = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise ValueError(
                f"model.path={folder} has neither model.safetensors nor model.safetensors.index.json: "
                "give a complete Hugging Face folder, or use model.load_format=dummy"
            )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            from safetensors import safe_open

            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"model.path={self.folder} lacks {file}, which its index names: copy it again")
            self._files[file] = safe_open(path, framework="pt")
        return self._files[file]

    def get(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        if name not in self._where:
            raise ValueError(
                f"model.path={self.folder} lacks the tensor {name} {list(shape)}: the checkpoint is incomplete "
                "or of another family"
            )
        part = self._open(self._where[name]).get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(
                f"{name} in {self.folder} has shape {part.get_shape()}, but config.json says {list(shape)}"
            )
        index: list[slice] = [slice(None)] * len(shape)
        if shard is not None:
            index[shard.dim] = shard.of(shape[shard.dim])
        tensor: Tensor = part[tuple(index)]
        # a copy: a slice of a mapped file would keep the file mapped
        made = tensor.to(self.device, dtype or self.dtype, copy=True).contiguous()
        self.bytes_read += made.nbytes
        self.progress(self.bytes_read)
        return made


class DummyWeights:
    """Random weights that depend only on the seed and the tensor's name, so that every mapping gets the same model.

    Norm weights ("norm" in the name, one dimension) are near one; the rest has the spread of a trained model.
    """

    def __init__(
        self, seed: int, dtype: torch.dtype, device: str, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        self.seed, self.dtype, self.device = seed, dtype, device
        self.progress = progress
        self.bytes_read = 0

    def get(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            full = full * 0.02 + (1.0 if "norm" in name else 0.0)
        else:
            full = full / shape[-1] ** 0.5
        if shard is not None:
            full = full.movedim(shard.dim, 0)[shard.of(shape[shard.dim])].movedim(0, shard.dim)
        made = full.to(self.device, dtype or self.dtype, copy=True).contiguous()
        self.bytes_read += made.nbytes
        self.progress(self.bytes_read)
        return made


def open_weights(model: ModelConfig, device: str, progress: Callable[[int], None] = lambda done: None) -> Weights:
    """The weights ``model`` names."""
    dtype = DTYPES[model.dtype]
    if model.load_format == "dummy":
        return DummyWeights(model.seed, dtype, device, progress)
    return SafetensorsWeights(Path(model.path), dtype, device, progress)
