"""ModelRunner: a batch of requests -> tensors -> forward -> one sampled token for each request that is due.

Owns the model, the KV cache and the attention backend of one rank. Knows neither the queue nor the network.
T: tokens of the DP group, S: rows of this rank's slice, N: requests that sample.
Read next: ``worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from toolkit.config import EngineConfig, ModelConfig
from toolkit.engine.arch import Arch
from toolkit.engine.attention.backend import make_attention
from toolkit.engine.core import Batch, Request, StepContext
from toolkit.engine.kv.kinds import layer_kinds
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.models.base import Forward, make_model
from toolkit.engine.moe.layer import MoEContext, keeps_fp8
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.sampler import Sampled, Sampler, token_logprobs
from toolkit.engine.weights import DTYPES, open_weights

LOGIT_ROWS = 256  # rows of the vocabulary's size that are held at a time; only logprobs of prompts need more


class ModelRunner:
    """One rank's model, ready to run.

    Args:
        progress: called with the bytes of weights loaded so far.
        nodes: that the ranks of one set of experts are on.

    Raises:
        ValueError: the checkpoint is incomplete or does not match its config.
    """

    def __init__(
        self,
        model: ModelConfig,
        arch: Arch,
        engine: EngineConfig,
        groups: Groups,
        device: str,
        progress: Callable[[int], None] = lambda done: None,
        nodes: int = 1,
    ) -> None:
        self.arch, self.groups, self.device = arch, groups, device
        self.padding = engine.dp_padding_mode
        self.moe = MoEContext.create(arch, engine, groups, device, nodes)
        weights = open_weights(model, device, progress, keeps_fp8(arch, engine, device))
        self.model = make_model(arch, weights, groups, self.moe, device)
        kinds = layer_kinds(arch.windows, engine)
        self.cache = KVCache(self.model.kv_spec, kinds, engine.page_size, DTYPES[model.dtype], device)
        self.attention = make_attention(engine.attention_backend, self.cache, device)
        self.sampler = Sampler()

    @torch.inference_mode()
    def step(self, batch: Batch, ctx: StepContext) -> Sampled:
        """Runs the agreed step; ranks without tokens pass an empty batch.

        Returns:
            One token for each request of the batch that ``samples``, in batch order.
        """
        hidden_TD = self.hidden(batch, ctx)
        scored: list[tuple[Request, int]] = []  # and the position before the token to be scored
        scored_rows, due_rows, first = [], [], 0
        for s in batch.scheduled:
            scored += [(s.request, position) for position in s.scored]
            scored_rows += [first + position - s.begin for position in s.scored]
            first += s.num_tokens
            due_rows += [first - 1] if s.samples else []
        hidden_ND = hidden_TD[torch.tensor(scored_rows + due_rows, dtype=torch.long, device=self.device)]
        due: list[Tensor] = []
        for begin in range(0, max(ctx.dp_logit_rows), LOGIT_ROWS):
            dp_rows = tuple(max(0, min(rows - begin, LOGIT_ROWS)) for rows in ctx.dp_logit_rows)
            logits = self.model.logits(hidden_ND[begin : begin + LOGIT_ROWS], dp_rows)
            part = scored[begin : begin + LOGIT_ROWS]
            _score(part, logits[: len(part)])
            if len(logits) > len(part):
                due.append(logits[len(part) :])
        requests = [s.request for s in batch.scheduled if s.samples]
        return self.sampler(torch.cat(due), requests) if requests else Sampled([], {})

    @torch.inference_mode()
    def hidden(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Final hidden states [T, D] of all tokens of the DP group."""
        step = self._forward(batch, ctx)
        if ctx.first_half is not None:
            rest = tuple(all_ - first for all_, first in zip(ctx.dp_tokens, ctx.first_half))
            contexts = (replace(ctx, dp_tokens=ctx.first_half), replace(ctx, dp_tokens=rest))
            first, second = (self._forward(half, c) for half, c in zip(split(batch), contexts))
            step = replace(step, halves=(first, second))
        tokens = [token for s in batch.scheduled for token in s.request.tokens[s.begin : s.end]]
        tokens_T = torch.tensor(tokens, dtype=torch.long, device=self.device)
        return step.layout.gather(self.model.forward(tokens_T, step))

    def _forward(self, batch: Batch, ctx: StepContext) -> Forward:
        layout = TokenLayout(ctx, self.groups, self.padding)
        assert layout.num_tokens == batch.num_tokens, f"agreed on {layout.num_tokens}, batch has {batch.num_tokens}"
        positions = [position for s in batch.scheduled for position in range(s.begin, s.end)]
        positions_T = torch.tensor(positions, dtype=torch.long, device=self.device)
        return Forward(positions_T, layout, self.attention.plan(batch), self.attention)


def _score(scored: list[tuple[Request, int]], logits_NV: Tensor) -> None:
    """Adds to each request the logprob of its token after each position."""
    if not scored:
        return
    following = [request.tokens[position + 1] for request, position in scored]
    tops = [request.sampling.prompt_logprobs or 0 for request, _ in scored]
    for (request, _), entry in zip(scored, token_logprobs(logits_NV, following, tops)):
        request.prompt_logprobs.append(entry)
