"""Where weights come from: safetensors folders, read by slice, or seeded random ones.

A model asks for each tensor it owns by its checkpoint name, its full shape and the part it wants; nothing else is
read, and what no model asked for is reported. Tensors in block-quantised FP8 (``fp8.py``) are dequantised, but for
matrices of whole blocks where FP8 is kept: on a GPU that multiplies in it.
Knows nothing of models. Read next: ``models/mixtral.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.config.model import ModelConfig
from toolkit.engine.fp8 import BlockFp8, Matrix, blocks_of, quantize_blocks
from toolkit.engine.gpu_libraries import scales_are_powers_of_two

log = logging.getLogger(__name__)

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

    def get_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Matrix:
        """The same for a matrix that ``layers.linear`` or experts multiply: in FP8 where it is stored and kept so."""
        ...

    def has(self, name: str) -> bool:
        """True when there is a tensor ``name``."""
        ...

    def skip(self, prefix: str, what: str) -> None:
        """Tensors whose names begin with ``prefix`` are left unread on purpose; ``what`` they are."""
        ...

    def report(self) -> None:
        """Logs, once everything was read, which tensors were not."""
        ...


class SafetensorsWeights:
    """A Hugging Face folder. Reads only the slices that are asked for.

    Args:
        folder: holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
        progress: called after each tensor with the bytes made so far.
        keep_fp8: ``get_matrix`` gives FP8 as it is stored.

    Raises:
        ValueError: no checkpoint in the folder; from ``get``: a tensor that is missing, of another shape or, in FP8,
            without its scales.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: str,
        progress: Callable[[int], None] = lambda done: None,
        keep_fp8: bool = False,
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.progress, self.keep_fp8 = progress, keep_fp8
        self.bytes_read = 0
        self._read: set[str] = set()
        self._skipped: dict[str, str] = {}
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
        part, index = self._find(name, shape, shard)
        if part.get_dtype() == "F8_E4M3":
            made = self.get_quantized(name, shape, shard).dequantize(dtype or self.dtype).to(self.device)
        else:
            # a copy: a slice of a mapped file would keep the file mapped
            made = part[index].to(self.device, dtype or self.dtype, copy=True).contiguous()
        self._count(made.nbytes)
        return made

    def get_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Matrix:
        part, _ = self._find(name, shape, shard)
        if not self.keep_fp8 or part.get_dtype() != "F8_E4M3":
            return self.get(name, shape, shard)
        stored = self.get_quantized(name, shape, shard)
        if not stored.whole:
            return self.get(name, shape, shard)
        made = stored.to(self.device)
        if scales_are_powers_of_two():
            made = quantize_blocks(made.dequantize(torch.float32), power_of_two=True)
        self._count(made.nbytes)
        return made

    def _count(self, size: int) -> None:
        self.bytes_read += size
        self.progress(self.bytes_read)

    def get_quantized(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> BlockFp8:
        """An FP8 matrix, or its ``shard``, as it is stored, on the host; shards need not begin on a block.

        Raises:
            ValueError: its scales are missing or do not fit.
        """
        block = self._block_size()
        part, index = self._find(name, shape, shard)
        scales_shape = tuple(-(-size // step) for size, step in zip(shape, block))
        scales, _ = self._find(f"{name}_scale_inv", scales_shape, None)
        ranges = [slice(*i.indices(size)) for i, size in zip(index, shape)]
        covered = tuple(blocks_of(r, step) for r, step in zip(ranges, block))
        offset = ranges[0].start % block[0], ranges[1].start % block[1]
        return BlockFp8(part[index].clone(), scales[covered].float().clone(), block, offset)

    def has(self, name: str) -> bool:
        return name in self._where

    def skip(self, prefix: str, what: str) -> None:
        self._skipped[prefix] = what

    def report(self) -> None:
        unread = [name for name in self._where if _any_expert(name) not in self._read]
        for prefix, what in self._skipped.items():
            left = [name for name in unread if name.startswith(prefix)]
            if left:
                log.info("%s: skipped %d tensors %s*: %s", self.folder, len(left), prefix, what)
            unread = [name for name in unread if not name.startswith(prefix)]
        if unread:
            some = ", ".join(sorted(unread)[:5]) + (", ..." if len(unread) > 5 else "")
            log.warning("%s: %d tensors belong to nothing this model computes: %s", self.folder, len(unread), some)

    def _find(self, name: str, shape: tuple[int, ...], shard: Shard | None) -> tuple[Any, tuple[slice, ...]]:
        """The tensor in its file, and the index of the wanted part."""
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
        self._read.add(_any_expert(name))
        index: list[slice] = [slice(None)] * len(shape)
        if shard is not None:
            index[shard.dim] = shard.of(shape[shard.dim])
        return part, tuple(index)

    def _block_size(self) -> tuple[int, int]:
        file = self.folder / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
        block = config.get("quantization_config", {}).get("weight_block_size")
        if block is None:
            raise ValueError(
                f"{file} lacks quantization_config.weight_block_size, but the checkpoint has FP8 tensors: "
                "give the config.json that was released with it"
            )
        return block[0], block[1]


def _any_expert(name: str) -> str:
    """A rank reads its own experts of each layer; the others' tensors are read elsewhere."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


class DummyWeights:
    """Random weights that depend only on the seed, the tensor's name and the kind of device, so that every mapping gets
    the same model. They are made where they will be.

    Norm weights ("norm" in the name, one dimension) are near one; the rest has the spread of a trained model.

    Args:
        keep_fp8: ``get_matrix`` gives matrices in FP8, as a checkpoint in FP8 would.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: str,
        progress: Callable[[int], None] = lambda done: None,
        keep_fp8: bool = False,
    ) -> None:
        self.seed, self.dtype, self.device = seed, dtype, device
        self.progress, self.keep_fp8 = progress, keep_fp8
        self.bytes_read = 0

    def get(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        made = self._make(name, shape, shard).to(dtype or self.dtype, copy=True).contiguous()
        self._count(made.nbytes)
        return made

    def get_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Matrix:
        whole_blocks = not any(size % 128 for size in shape) and (
            shard is None or not shape[shard.dim] // shard.count % 128
        )
        if not self.keep_fp8 or not whole_blocks:
            return self.get(name, shape, shard)
        made = quantize_blocks(self._make(name, shape, shard), scales_are_powers_of_two())
        self._count(made.nbytes)
        return made

    def _make(self, name: str, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.randn(shape, generator=generator, device=self.device)
        if len(shape) == 1:
            full = full * 0.02 + (1.0 if "norm" in name else 0.0)
        else:
            full = full / shape[-1] ** 0.5
        if shard is not None:
            full = full.movedim(shard.dim, 0)[shard.of(shape[shard.dim])].movedim(0, shard.dim)
        return full

    def _count(self, size: int) -> None:
        self.bytes_read += size
        self.progress(self.bytes_read)

    def has(self, name: str) -> bool:
        return True

    def skip(self, prefix: str, what: str) -> None:
        """There is nothing to skip."""

    def report(self) -> None:
        """There is nothing that is not asked for."""


def open_weights(
    model: ModelConfig, device: str, progress: Callable[[int], None] = lambda done: None, keep_fp8: bool = False
) -> Weights:
    """The weights ``model`` names."""
    dtype = DTYPES[model.dtype]
    if model.load_format == "dummy":
        return DummyWeights(model.seed, dtype, device, progress, keep_fp8)
    return SafetensorsWeights(Path(model.path), dtype, device, progress, keep_fp8)
