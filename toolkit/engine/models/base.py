"""What the runner asks of a model, and the table of families. Read next: ``mixtral.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from toolkit.engine.arch import Arch
from toolkit.engine.attention.backend import AttentionBackend, AttentionPlan
from toolkit.engine.kv.pool import KVSpec
from toolkit.engine.moe.layer import MoEContext
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.weights import Weights
from toolkit.registry import Registry


@dataclass(frozen=True)
class Forward:
    """One step, as the layers see it.

    Attributes:
        positions_T: position of each token of the DP group.
        layout: how the tokens lie over the ranks.
        plan: what attention reads and writes.
        attention: the backend, bound to this rank's KV cache.
        halves: the same tokens as two batches that take turns (two-batch overlap), or None.
    """

    positions_T: Tensor
    layout: TokenLayout
    plan: AttentionPlan
    attention: AttentionBackend
    halves: tuple[Forward, Forward] | None = None


class Model(Protocol):
    """A family's forward pass on one rank."""

    kv_spec: KVSpec

    def forward(self, tokens_T: Tensor, step: Forward) -> Tensor:
        """Token ids of the DP group -> final hidden states [S, D] of this rank's slice."""
        ...

    def logits(self, hidden_ND: Tensor, dp_rows: tuple[int, ...]) -> Tensor:
        """Hidden states, the same on all ranks of the DP group -> logits [N, V], in float32 or the weights' type.

        ``dp_rows``: N of each DP rank. Every rank calls when any of them is not zero.
        """
        ...


class ModelFactory(Protocol):
    def __call__(self, arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> Model: ...


MODELS: Registry[ModelFactory] = Registry("model_type")


def make_model(arch: Arch, weights: Weights, groups: Groups, moe: MoEContext, device: str) -> Model:
    """Builds the family of ``arch``, reading its weights; rank 0 reports what of the checkpoint it did not need."""
    from toolkit.engine.models import deepseek_v3, gemma3, mixtral, qwen3_moe  # noqa: F401  (register themselves)

    model = MODELS[arch.family](arch, weights, groups, moe, device)
    if groups.rank == 0:
        weights.report()
    return model
