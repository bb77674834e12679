"""Experts and tokens that do not depend on rounding: what two runs of a random model need to be compared by logits.

The gate of a random model is full of near ties, and so are its logits: another order of the same sum sends a token to
another expert, or makes the text another one. Here a table gives each token id its experts and their weights, and the
sampler takes given tokens. What is left between two runs is the rounding of sums.
T: tokens, K: top-k, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.core import Request
from toolkit.engine.models.base import Forward
from toolkit.engine.moe import gate
from toolkit.engine.runner import ModelRunner
from toolkit.engine.sampler import Chosen

Rows = dict[tuple[str, int], np.ndarray]
"""Logits by request and output position."""


class Tokens:
    """The model, which lets its gates know the step's token ids, also inside a CUDA graph."""

    def __init__(self, runner: ModelRunner) -> None:
        self._forward, self.ids_T = runner.model.forward, torch.empty(0)
        self.halved = runner.engine.enable_two_batch_overlap
        runner.model.forward = self.forward  # type: ignore[method-assign]

    def forward(self, tokens_T: Tensor, step: Forward) -> Tensor:
        assert step.layout.comm.size == 1, "rows are not the step's tokens"
        self.ids_T = tokens_T
        return self._forward(tokens_T, step)


class TableGate:
    """A layer's gate: experts by token id, the popular ones more often; where halves take turns, one id's for all."""

    def __init__(self, tokens: Tokens, vocab: int, experts: int, top_k: int, seed: int, device: str) -> None:
        rng, self._tokens = np.random.default_rng(seed), tokens
        popular = rng.permutation(np.arange(1, experts + 1) ** -0.5)
        order = np.argsort(-(rng.gumbel(size=(vocab, experts)) + np.log(popular)))[:, :top_k]
        weights = rng.dirichlet(np.full(top_k, 8.0), vocab)
        self.ids_VK = torch.from_numpy(order.copy()).to(device)
        self.weights_VK = torch.from_numpy(weights).float().to(device)

    def __call__(self, x_SD: Tensor, real: Tensor | None = None, table: Tensor | None = None) -> gate.Chosen:
        ids_T = self._tokens.ids_T
        if self._tokens.halved:
            ids_T = ids_T.new_zeros(len(x_SD))
        assert len(x_SD) == len(ids_T)
        return gate.Chosen(gate._drop_padding(self.ids_VK[ids_T], real), self.weights_VK[ids_T])


class ForcedSampler:
    """Takes the tokens it is given, else the most likely ones, and keeps the logits of all, without waiting."""

    def __init__(self) -> None:
        self.forced: dict[str, list[int]] = {}
        self._seen: list[tuple[list[tuple[str, int]], Tensor]] = []

    def choose(self, logits_NV: Tensor, requests: Sequence[Request], greedy_N: Tensor | None = None) -> Chosen:
        places = [(r.rid, r.num_output) for r in requests]
        self._seen.append((places, logits_NV.clone()))
        if self.forced:
            given = torch.tensor([self.forced[rid][position] for rid, position in places], dtype=torch.int32)
            tokens = given.pin_memory().to(logits_NV.device, non_blocking=True) if logits_NV.is_cuda else given
        else:
            tokens = logits_NV.argmax(-1).int()
        return Chosen(tokens, logits_NV, requests)

    def take(self) -> Rows:
        """The logits since the last call."""
        seen, self._seen = self._seen, []
        return {place: row for places, rows in seen for place, row in zip(places, rows.float().cpu().numpy())}


def force(runner: ModelRunner) -> ForcedSampler:
    """Gives ``runner`` such gates and such a sampler; before its graphs are captured."""
    tokens, sampler, arch = Tokens(runner), ForcedSampler(), runner.arch
    for layer in runner.moe.layers:
        layer.gate = TableGate(tokens, arch.vocab_size, arch.num_experts, arch.top_k, layer.index, runner.device)
    made: Any = sampler
    runner.sampler = made
    return sampler


def furthest(found: Rows, wanted: Rows) -> float:
    """The largest relative error of a position's logits."""
    assert found.keys() == wanted.keys(), "other positions were computed"
    return max(float(np.linalg.norm(found[at] - row) / np.linalg.norm(row)) for at, row in wanted.items())
