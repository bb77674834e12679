"""ModelRunner: a batch of requests -> tensors -> forward -> one sampled token for each request that is due.

Owns the model, the KV cache and the attention backend of one rank. Knows neither the queue nor the network.
T: tokens of the DP group, S: rows of this rank's slice, N: requests that sample.
Read next: ``worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toolkit.config import EngineConfig, ModelConfig
from toolkit.engine.arch import Arch
from toolkit.engine.attention.backend import make_attention
from toolkit.engine.core import Batch, StepContext
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.models.base import Forward, make_model
from toolkit.engine.moe.layer import MoEContext
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.sampler import Sampled, Sampler, token_logprobs
from toolkit.engine.weights import DTYPES, open_weights

LOGPROB_ROWS = 64  # rows of the vocabulary's size held at a time for logprobs of a prompt


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
        self.moe = MoEContext.create(arch, engine, groups, device)
        self.model = make_model(arch, open_weights(model, device, progress), groups, self.moe, device)
        num_blocks = engine.max_total_tokens // engine.page_size
        self.cache = KVCache(self.model.kv_spec, num_blocks, engine.page_size, DTYPES[model.dtype], device)
        self.attention = make_attention(engine.attention_backend, self.cache, device)
        self.sampler = Sampler()

    @torch.inference_mode()
    def step(self, batch: Batch, ctx: StepContext) -> Sampled:
        """Runs the agreed step; ranks without tokens pass an empty batch.

        Returns:
            One token for each request of the batch that ``samples``, in batch order.
        """
        hidden_SD, layout = self._forward(batch, ctx)
        self._add_prompt_logprobs(batch, hidden_SD, layout)
        return self.sampler(self._due(batch, hidden_SD, layout), [s.request for s in batch.scheduled if s.samples])

    @torch.inference_mode()
    def logits(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Logits [N, V] float32 of the sampling requests' last tokens."""
        return self._due(batch, *self._forward(batch, ctx))

    def _due(self, batch: Batch, hidden_SD: Tensor, layout: TokenLayout) -> Tensor:
        ends = torch.tensor([s.num_tokens for s in batch.scheduled], dtype=torch.long).cumsum(0) - 1
        due = torch.tensor([s.samples for s in batch.scheduled], dtype=torch.bool)
        if not due.any():  # the same on every rank of the attention TP group
            return hidden_SD.new_empty(0, self.arch.vocab_size, dtype=torch.float32)
        return self.model.logits(layout.gather(hidden_SD)[ends[due].to(self.device)])

    def _add_prompt_logprobs(self, batch: Batch, hidden_SD: Tensor, layout: TokenLayout) -> None:
        """For the requests that ask for them: each computed token of the prompt scores the one after it."""
        row = 0
        for s in batch.scheduled:
            request, top, first = s.request, s.request.sampling.prompt_logprobs, row
            row += s.num_tokens
            begin = len(request.prompt_logprobs)  # not num_computed: a preempted request computes some again
            end = min(request.num_computed + s.num_tokens, request.prompt_len - 1)
            if top is None or begin >= end:
                continue
            first += begin - request.num_computed
            hidden = layout.gather(hidden_SD)[first : first + end - begin]
            following = request.tokens[begin + 1 : end + 1]
            for i in range(0, end - begin, LOGPROB_ROWS):
                rows = slice(i, i + LOGPROB_ROWS)
                logits = self.model.logits(hidden[rows])
                request.prompt_logprobs += token_logprobs(logits, following[rows], [top] * len(following[rows]))

    @torch.inference_mode()
    def hidden(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Final hidden states [T, D] of all tokens of the DP group."""
        hidden_SD, layout = self._forward(batch, ctx)
        return layout.gather(hidden_SD)

    def _forward(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, TokenLayout]:
        tokens: list[int] = []
        positions: list[int] = []
        for s in batch.scheduled:
            begin, end = s.request.num_computed, s.request.num_computed + s.num_tokens
            tokens += s.request.tokens[begin:end]
            positions += range(begin, end)
        layout = TokenLayout(ctx, self.groups)
        assert layout.num_tokens == len(tokens), f"agreed on {layout.num_tokens} tokens, batch has {len(tokens)}"
        positions_T = torch.tensor(positions, dtype=torch.long, device=self.device)
        step = Forward(positions_T, layout, self.attention.plan(batch), self.attention)
        return self.model.forward(torch.tensor(tokens, dtype=torch.long, device=self.device), step), layout
