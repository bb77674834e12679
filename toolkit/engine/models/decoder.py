"""Decoder: the stack of pre-norm layers that Mixtral, Qwen3-MoE and DeepSeek-V3 share, in one batch or in two halves.

S: rows of this rank's slice, T: tokens of the DP group, D: hidden. Knows neither checkpoints nor what attention does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.engine.layers import DenseFFN, RMSNorm
from toolkit.engine.models.base import Forward
from toolkit.engine.moe.layer import MoELayer
from toolkit.engine.overlap import Stages, finish, interleave


class LayerAttention(Protocol):
    """Attention in the two parts between which another half batch may run."""

    def prepare(self, x_SD: Tensor, step: Forward) -> Any:
        """Everything before the scores: projections, norms, positions."""
        ...

    def attend(self, prepared: Any, step: Forward) -> Tensor:
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

    def stages(self, x_SD: Tensor, step: Forward) -> Stages:
        prepared = self.attention.prepare(self.attention_norm(x_SD), step)
        yield "prepared"
        x = x_SD + self.attention.attend(prepared, step)
        h = self.ffn_norm(x)
        if isinstance(self.ffn, MoELayer):
            return x + (yield from self.ffn.stages(h, step.layout))
        return x + self.ffn(h, step.layout)


class Decoder:
    """Layers, run one after another."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = layers

    def __call__(self, x_SD: Tensor, step: Forward) -> Tensor:
        if step.halves is None:
            return finish(_chain(self.layers, x_SD, step))
        for overlaps, run in groupby(self.layers, lambda layer: layer.overlaps):
            layers = list(run)
            x_SD = _in_turns(layers, x_SD, step) if overlaps else finish(_chain(layers, x_SD, step))
        return x_SD


def _in_turns(layers: Sequence[DecoderLayer], x_SD: Tensor, step: Forward) -> Tensor:
    """The two halves of the batch through ``layers``, taking turns."""
    assert step.halves is not None, "a step without halves"
    a, b = step.halves
    x_TD, cut = step.layout.gather(x_SD), a.layout.num_tokens
    first = _chain(layers, a.layout.scatter(x_TD[:cut]), a)
    second = _chain(layers, b.layout.scatter(x_TD[cut:]), b)
    x_a, x_b = interleave(first, second, step.layout.is_extend)
    return step.layout.scatter(torch.cat([a.layout.gather(x_a), b.layout.gather(x_b)]))


def _chain(layers: Sequence[DecoderLayer], x_SD: Tensor, step: Forward) -> Stages:
    for layer in layers:
        x_SD = yield from layer.stages(x_SD, step)
    return x_SD
