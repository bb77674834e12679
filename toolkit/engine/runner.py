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
from toolkit.engine.core import Batch, StepContext
from toolkit.engine.kv.kinds import layer_kinds
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.models.base import Forward, make_model
from toolkit.engine.moe.layer import MoEContext
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.sampler import Sampled, Sampler, token_logprobs
from toolkit.engine.weights import DTYPES, open_weights


class ModelRunner:
    """One rank's model, ready to run.

    Args:
        progress: called with the bytes of weights loaded so far.

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
    ) -> None:
        self.arch, self.groups, self.device = arch, groups, device
        self.padding = engine.dp_padding_mode
        self.moe = MoEContext.create(arch, engine, groups, device)
        self.model = make_model(arch, open_weights(model, device, progress), groups, self.moe, device)
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
        requests = [s.request for s in batch.scheduled if s.samples]
        if not any(ctx.dp_logit_rows):
            return self.sampler(hidden_TD.new_empty(0, self.arch.vocab_size), requests)
        rows: list[int] = []
        first = 0
        for s in batch.scheduled:
            rows += [first + position - s.begin for position in s.logit_positions]
            first += s.num_tokens
        logits = self.model.logits(
            hidden_TD[torch.tensor(rows, dtype=torch.long, device=self.device)], ctx.dp_logit_rows
        )
        return self.sampler(logits[self._score_prompts(batch, logits)], requests)

    def _score_prompts(self, batch: Batch, logits: Tensor) -> list[int]:
        """Adds the prompt logprobs that this step gives; returns the rows of ``logits`` that tokens are drawn from."""
        due, row = [], 0
        for s in batch.scheduled:
            scored = len(s.logit_positions) - s.samples
            if scored:
                following = s.request.tokens[s.logit_positions[0] + 1 :][:scored]
                top = s.request.sampling.prompt_logprobs or 0
                s.request.prompt_logprobs += token_logprobs(logits[row : row + scored], following, [top] * scored)
            row += scored
            if s.samples:
                due.append(row)
                row += 1
        return due

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
