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
from toolkit.engine.sampler import sample
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

    @torch.inference_mode()
    def step(self, batch: Batch, ctx: StepContext) -> list[int]:
        """Runs the agreed step; ranks without tokens pass an empty batch.

        Returns:
            One token for each request of the batch that ``samples``, in batch order.
        """
        logits = self.logits(batch, ctx)
        return sample(logits, [s.request for s in batch.scheduled if s.samples])

    @torch.inference_mode()
    def logits(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Logits [N, V] float32 of the sampling requests' last tokens."""
        hidden_TD = self.hidden(batch, ctx)
        if not any(ctx.dp_samples):
            return hidden_TD.new_empty(0, self.arch.vocab_size, dtype=torch.float32)
        ends = torch.tensor([s.num_tokens for s in batch.scheduled], dtype=torch.long).cumsum(0) - 1
        due = torch.tensor([s.samples for s in batch.scheduled], dtype=torch.bool)
        return self.model.logits(hidden_TD[ends[due].to(self.device)], ctx.dp_samples)

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
