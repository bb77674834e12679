"""The expert GEMM seam: every slot's SwiGLU over its dispatched rows, and the torch reference.

e: slots of this rank, F: expert FFN columns of this rank, D: hidden. Knows nothing of routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from toolkit.engine.layers import swiglu
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.registry import Registry


@dataclass
class ExpertWeights:
    """Weights of one layer's slots on this rank: gate_up [e, 2F, D] (gate rows first), down [e, D, F]."""

    gate_up: Tensor
    down: Tensor


class ExpertGemm(Protocol):
    """Runs the experts of one layer.

    Attributes:
        alignment: rows at which slots must start in the contiguous layout.
    """

    alignment: int

    def pack(self, weights: ExpertWeights) -> None:
        """Takes the weights; called after loading and again after slots were overwritten."""
        ...

    def __call__(self, rows: Dispatched) -> Tensor:
        """Each slot's FFN over its rows -> the shape of ``rows.x``; padding rows come back as anything."""
        ...


class GemmFactory(Protocol):
    def __call__(self) -> ExpertGemm: ...


GEMMS: Registry[GemmFactory] = Registry("engine.moe_runner_backend")


def make_gemm(name: str) -> ExpertGemm:
    """A new instance, one a layer; auto: torch."""
    return GEMMS["torch" if name == "auto" else name]()


@GEMMS.register("torch")
class TorchGemm:
    """One pair of matmuls a slot that has rows."""

    alignment = 1

    def pack(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def __call__(self, rows: Dispatched) -> Tensor:
        out = rows.x.new_zeros(rows.x.shape)
        w = self.weights
        for slot, (count, start) in enumerate(zip(rows.counts.tolist(), rows.starts.tolist())):
            if count:
                part = out[slot] if rows.layout == "masked" else out[start:]
                x = rows.x[slot] if rows.layout == "masked" else rows.x[start:]
                part[:count] = swiglu(x[:count], w.gate_up[slot], w.down[slot])
        return out
