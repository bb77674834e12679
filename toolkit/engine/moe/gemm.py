"""The expert GEMM seam: every slot's SwiGLU over its dispatched rows, and the torch reference.

e: slots of this rank, F: expert FFN columns of this rank, D: hidden. Knows nothing of routing.
Read next: ``deep_gemm.py``, what a GPU uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from toolkit.engine.fp8 import BLOCK, BlockFp8
from toolkit.engine.gpu_libraries import has_deep_gemm
from toolkit.engine.layers import swiglu
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.registry import Registry

if TYPE_CHECKING:
    from toolkit.engine.moe.triton_gemm import TritonGemm


@dataclass
class ExpertWeights:
    """Weights of one layer's slots on this rank: gate_up [e, 2F, D] (gate rows first), down [e, D, F].

    Attributes:
        gate_up_scales, down_scales: where the weights are float8_e4m3: float32 scales of their 128 x 128 blocks,
            [e, 2F / 128, D / 128] and [e, D / 128, F / 128].
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    @property
    def fp8(self) -> bool:
        return self.gate_up_scales is not None


class ExpertGemm(Protocol):
    """Runs the experts of one layer.

    Attributes:
        alignment, decode_alignment: rows at which slots must start in the contiguous layout, in steps with and
            without prefill.
    """

    alignment: int
    decode_alignment: int

    def pack(self, weights: ExpertWeights) -> None:
        """Takes the weights; called after loading and again after slots were overwritten."""
        ...

    def __call__(self, rows: Dispatched) -> Tensor:
        """Each slot's FFN over its rows, times ``rows.weights`` -> the shape of ``rows.x`` in the model's type.

        Padding rows come back as anything.
        """
        ...

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        """Values of ``Dispatched.expected`` that need code of their own; each is run once at start.

        Args:
            most: the largest value. alignment: of slots, where they are told apart by it.
        """
        ...


class GemmFactory(Protocol):
    def __call__(self) -> ExpertGemm: ...


GEMMS: Registry[GemmFactory] = Registry("engine.moe_runner_backend")


def make_gemm(name: str, device: str = "cpu") -> ExpertGemm:
    """A new instance, one a layer.

    Args:
        name: auto: torch on CPUs; on a GPU what suits the weights, see ``AutoGemm``.
    """
    from toolkit.engine.moe import deep_gemm, grouped_mm, triton_gemm  # noqa: F401  (register themselves)

    if name == "auto":
        return TorchGemm() if device == "cpu" else AutoGemm()
    return GEMMS[name]()


class AutoGemm:
    """On a GPU: deep_gemm where it is installed and runs; grouped_mm for other bf16 experts; torch for the rest.

    On Hopper triton multiplies bf16 experts that have few rows each. Slots are aligned for the strictest of them,
    before the weights are known.
    """

    def __init__(self) -> None:
        self.gemm: ExpertGemm | None = None
        self.few: TritonGemm | None = None
        strictest = GEMMS["deep_gemm" if has_deep_gemm() else "grouped_mm"]()
        self.alignment, self.decode_alignment = strictest.alignment, strictest.decode_alignment

    def pack(self, weights: ExpertWeights) -> None:
        if self.gemm is None:
            self.gemm, self.few = self._choose(weights), self._choose_few(weights)
        self.gemm.pack(weights)
        if self.few is not None:
            self.few.pack(weights)

    def _choose(self, weights: ExpertWeights) -> ExpertGemm:
        # DeepGEMM's tiles are 64 columns wide in bf16; torch wants rows of 16 bytes
        sizes = weights.down.shape[1:]
        if weights.gate_up.dtype == torch.float32 or any(size % 8 for size in sizes):
            name = "torch"
        else:
            name = "deep_gemm" if has_deep_gemm() and not any(size % 64 for size in sizes) else "grouped_mm"
        return GEMMS[name]()

    def _choose_few(self, weights: ExpertWeights) -> TritonGemm | None:
        from toolkit.engine.moe.triton_gemm import TritonGemm

        on_hopper = weights.down.is_cuda and torch.cuda.get_device_capability()[0] == 9
        return TritonGemm() if on_hopper and TritonGemm.takes(weights) else None

    def _of(self, expected: int) -> ExpertGemm:
        gemm = self.few if self.few is not None and expected <= self.few.few else self.gemm
        assert gemm is not None, "rows before weights"
        return gemm

    def __call__(self, rows: Dispatched) -> Tensor:
        return self._of(rows.expected)(rows)

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        assert self.gemm is not None, "shapes before weights"
        if self.few is not None:
            yield from self.few.shapes(most, alignment)
        yield from (size for size in self.gemm.shapes(most, alignment) if self._of(size) is self.gemm)


@GEMMS.register("torch")
class TorchGemm:
    """One pair of matmuls a slot that has rows; FP8 weights are multiplied as the model's type."""

    alignment = decode_alignment = 1

    def pack(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def __call__(self, rows: Dispatched) -> Tensor:
        x = rows.x if rows.scales is None else dequantize_rows(rows.x, rows.scales)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._without_waiting(rows, x)
        out = x.new_zeros(x.shape)
        for slot, (count, start) in enumerate(zip(rows.counts.tolist(), rows.starts.tolist())):
            if not count:
                continue
            given, end = (x[slot], count) if rows.layout == "masked" else (x, start + count)
            done = swiglu(given[start:end], *self._slot(slot, x.dtype))
            if rows.weights is not None:
                done = done * rows.weights[start:end, None].to(done.dtype)
            (out[slot] if rows.layout == "masked" else out)[start:end] = done
        return out

    def shapes(self, most: int, alignment: int) -> Iterator[int]:
        return iter(())

    def _without_waiting(self, rows: Dispatched, x: Tensor) -> Tensor:
        """For CUDA graphs, which cannot ask how many rows a slot has: every row through every expert."""
        out = x.new_zeros(x.shape)
        if rows.layout == "masked":
            for slot in range(len(x)):
                out[slot] = swiglu(x[slot], *self._slot(slot, x.dtype))
            return out
        row = torch.arange(len(x), device=x.device)
        for slot in range(len(rows.ends)):
            mine = (row >= rows.starts[slot]) & (row < rows.ends[slot])
            out = torch.where(mine[:, None], swiglu(x, *self._slot(slot, x.dtype)), out)
        return out if rows.weights is None else out * rows.weights[:, None].to(out.dtype)

    def _slot(self, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = self.weights
        if w.gate_up_scales is None or w.down_scales is None:
            return w.gate_up[slot], w.down[slot]
        block = BLOCK, BLOCK
        gate_up = BlockFp8(w.gate_up[slot], w.gate_up_scales[slot], block, (0, 0))
        return gate_up.dequantize(dtype), BlockFp8(w.down[slot], w.down_scales[slot], block, (0, 0)).dequantize(dtype)


def dequantize_rows(x: Tensor, scales: Tensor) -> Tensor:
    """FP8 rows [.., D] with scales [.., D / 128] -> bfloat16."""
    groups: Tensor = x.float().unflatten(-1, (-1, BLOCK))
    return (groups * scales[..., None]).flatten(-2).to(torch.bfloat16)
