"""Decoder: the stack of pre-norm layers that Mixtral, Qwen3-MoE and DeepSeek-V3 share, in one batch or in two halves.

S: rows of this rank's slice, T: tokens of the DP group, D: hidden. Knows neither checkpoints nor what attention does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.engine.late import Late, now
from toolkit.engine.layers import DenseFFN, RMSNorm
from toolkit.engine.models.base import Forward
from toolkit.engine.moe.layer import MoELayer
from toolkit.engine.overlap import Stages, finish, interleave

# The residual stream [S, D] and what the last layer adds to it, so that one kernel can add and norm.
Residual = tuple[Tensor, Tensor | Late | None]


class LayerAttention(Protocol):
    """Attention in the two parts between which another half batch may run."""

    def prepare(self, x_SD: Tensor, step: Forward) -> Any:
        """Everything before the scores: projections, norms, positions."""
        ...

    def attend(self, prepared: Any, step: Forward) -> Tensor | Late:
        """Cache, scores, output projection -> [S, D]."""
        ...


class DecoderLayer:
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self, attention_norm: RMSNorm, attention: LayerAttention, ffn_norm: RMSNorm, ffn: DenseFFN | MoELayer
    ) -> None:
        self.attention_norm, self.attention, self.ffn_norm, self.ffn = attention_norm, attention, ffn_norm, ffn

    @property
    def overlaps(self) -> bool:
        """Whether two halves gain from taking turns; dense layers run the whole batch."""
        return isinstance(self.ffn, MoELayer)

    def stages(self, residual: Residual, step: Forward) -> Stages[Residual]:
        x, h = _enter(residual, self.attention_norm)
        prepared = self.attention.prepare(h, step)
        yield "prepared"
        x, h = self.ffn_norm.add(x, self.attention.attend(prepared, step))
        if isinstance(self.ffn, MoELayer):
            return x, (yield from self.ffn.stages(h, step.layout))
        return x, self.ffn(h, step.layout)


class Decoder:
    """Layers, run one after another, and the norm after the last."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: RMSNorm) -> None:
        self.layers, self.norm = layers, norm

    def __call__(self, x_SD: Tensor, step: Forward) -> Tensor:
        residual: Residual = (x_SD, None)
        if step.halves is None:
            return _enter(finish(_chain(self.layers, residual, step)), self.norm)[1]
        for overlaps, run in groupby(self.layers, lambda layer: layer.overlaps):
            layers = list(run)
            residual = _in_turns(layers, residual, step) if overlaps else finish(_chain(layers, residual, step))
        return _enter(residual, self.norm)[1]


def _enter(residual: Residual, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """The residual stream with what is still to be added to it, and its norm."""
    x, delta = residual
    return (x, norm(x)) if delta is None else norm.add(x, delta)


def _in_turns(layers: Sequence[DecoderLayer], residual: Residual, step: Forward) -> Residual:
    """The two halves of the batch through ``layers``, taking turns."""
    assert step.halves is not None, "a step without halves"
    a, b = step.halves
    x_TD, cut = step.layout.gather(_sum(residual)), a.layout.num_tokens
    first = _chain(layers, (a.layout.scatter(x_TD[:cut]), None), a)
    second = _chain(layers, (b.layout.scatter(x_TD[cut:]), None), b)
    r_a, r_b = interleave(first, second, step.layout.is_extend)
    return step.layout.scatter(torch.cat([a.layout.gather(_sum(r_a)), b.layout.gather(_sum(r_b))])), None


def _sum(residual: Residual) -> Tensor:
    x, delta = residual
    return x if delta is None else x + now(delta)


def _chain(layers: Sequence[DecoderLayer], residual: Residual, step: Forward) -> Stages[Residual]:
    for layer in layers:
        residual = yield from layer.stages(residual, step)
    return residual
