"""Gates: which experts a token goes to, and with what weights. They speak logical experts.

S: rows, D: hidden, E: experts, K: top-k.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine import fused


class Chosen(NamedTuple):
    """Logical experts int64 [S, K], weights float32 [S, K]; slots int64 [S, K] where the gate looked them up."""

    ids_SK: Tensor
    weights_SK: Tensor
    slots_SK: Tensor | None = None


class Gate(Protocol):
    def __call__(self, x_SD: Tensor, real: Tensor | None = None, table: Tensor | None = None) -> Chosen:
        """The experts of each row.

        Args:
            real: on the device, int32 [1]: rows from this one on are padding, their ids -1.
            table: the slot of each expert, and -1 at its end: a gate may look slots up on its way.
        """
        ...


class SoftmaxGate:
    """Softmax over all experts, then top-k (Mixtral, Qwen3-MoE)."""

    def __init__(self, weight_ED: Tensor, top_k: int, renormalize: bool) -> None:
        self.weight_ED, self.top_k, self.renormalize = weight_ED, top_k, renormalize

    def __call__(self, x_SD: Tensor, real: Tensor | None = None, table: Tensor | None = None) -> Chosen:
        if fused.supported(x_SD):
            return Chosen(*fused.softmax_route(x_SD, self.weight_ED, self.top_k, self.renormalize, real, table))
        probs = F.linear(x_SD, self.weight_ED).float().softmax(-1)
        weights, ids = probs.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Chosen(_drop_padding(ids, real), weights)


class GroupedSigmoidGate:
    """DeepSeek-V3's ``noaux_tc``: sigmoid scores, biased for the choice only, and limited to the best groups.

    A group's score is the sum of its two best biased scores; experts outside the best ``topk_group`` groups cannot
    be chosen. Weights are the unbiased scores, normalised over the chosen ones if ``renormalize``, times ``scale``.
    """

    def __init__(
        self,
        weight_ED: Tensor,
        bias_E: Tensor,
        top_k: int,
        n_group: int,
        topk_group: int,
        renormalize: bool,
        scale: float,
    ) -> None:
        self.given_ED, self.weight_ED, self.bias_E = weight_ED, weight_ED.float(), bias_E.float()
        self.top_k, self.n_group, self.topk_group = top_k, n_group, topk_group
        self.renormalize, self.scale = renormalize, scale

    def __call__(self, x_SD: Tensor, real: Tensor | None = None, table: Tensor | None = None) -> Chosen:
        if fused.supported(x_SD):
            return Chosen(*fused.grouped_route(x_SD, self, real, table))
        return self.plain(x_SD, real)

    def plain(self, x_SD: Tensor, real: Tensor | None = None) -> Chosen:
        """In torch."""
        scores = F.linear(x_SD.float(), self.weight_ED).sigmoid()
        choice = scores + self.bias_E
        groups = choice.unflatten(1, (self.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool, device=x_SD.device).scatter_(1, best, True)
        masked = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        ids = masked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Chosen(_drop_padding(ids, real), weights * self.scale)


def _drop_padding(ids_SK: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return ids_SK
    return ids_SK.masked_fill_((torch.arange(len(ids_SK), device=ids_SK.device) >= real)[:, None], -1)
