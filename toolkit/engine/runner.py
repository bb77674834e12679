"""ModelRunner: a batch of requests -> tensors -> forward -> one sampled token for each request that is due.

``launch`` returns as soon as the device has been told what to do; ``Launched.result`` waits for the tokens. So the host
can prepare the next step meanwhile (``pipeline.py``). On CPU everything has happened when ``launch`` returns.
Owns the model, the KV cache, the attention backend and the graphs of one rank. Knows neither queue nor network.
T: tokens of the DP group, S: rows of this rank's slice, N: requests that sample.
Read next: ``pipeline.py``, ``worker.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.arch import Arch, context_length
from toolkit.engine.attention.backend import make_attention
from toolkit.engine.core import Batch, Request, StepContext
from toolkit.engine.graphs import DecodeGraphs, bucket_sizes
from toolkit.engine.inputs import LastTokens, resolve_tokens, token_arrays
from toolkit.engine.kv.kinds import layer_kinds
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.kv.transfer import KVTransfer
from toolkit.engine.models.base import Forward, make_model
from toolkit.engine.moe.dispatch import StepRows
from toolkit.engine.moe.layer import MoEContext, keeps_fp8
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.sampler import Chosen, Sampled, Sampler, token_logprobs
from toolkit.engine.scheduler import Scheduler
from toolkit.engine.staging import ints, to_device
from toolkit.engine.weights import DTYPES, open_weights

log = logging.getLogger(__name__)

LOGIT_ROWS = 256  # rows of the vocabulary's size that are held at a time; only logprobs of prompts need more


class Launched:
    """A step under way. ``result`` waits for it."""

    def __init__(self, chosen: Chosen | None, device: str) -> None:
        self._chosen = chosen
        self._host = None if chosen is None else _to_host(chosen.tokens_N)
        self._done = self._host[1] if self._host is not None else None
        if chosen is None and device != "cpu":
            self._done = torch.cuda.Event()
            self._done.record()

    def settle(self) -> None:
        """Waits until the device has done this step; what was launched after it goes on."""
        if self._done is not None:
            self._done.synchronize()

    def result(self) -> Sampled:
        """One token for each request of the batch that ``samples``, in batch order."""
        if self._chosen is None or self._host is None:
            return Sampled([], {})
        tokens, copied = self._host
        if copied is not None:
            copied.synchronize()
        return self._chosen.report(tokens.tolist())


class ModelRunner:
    """One rank's model, ready to run.

    Args:
        progress: called with the bytes of weights loaded so far.
        nodes: that the ranks of one set of experts are on.
        transfer: gives the KV cache its memory, so that peers can read it; None: nobody does.

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
        transfer: KVTransfer | None = None,
    ) -> None:
        self.transfer = transfer
        self.arch, self.groups, self.device = arch, groups, device
        self.padding = engine.dp_padding_mode
        self._dtype = DTYPES[model.dtype]
        self.moe = MoEContext.create(arch, engine, groups, device, nodes)
        weights = open_weights(model, device, progress, keeps_fp8(arch, engine, device))
        self.model = make_model(arch, weights, groups, self.moe, device)
        self.sampler = Sampler()
        self.last = LastTokens(engine.chunked_prefill_size, device)
        self.graphs: DecodeGraphs | None = None
        self.allocate(engine)

    def allocate(self, engine: EngineConfig) -> None:
        """Makes the KV cache for ``engine``; what another held is forgotten."""
        self.graphs = None
        self.__dict__.pop("cache", None)
        self.__dict__.pop("attention", None)
        self.engine = engine
        kinds = layer_kinds(self.arch.windows, engine)
        memory = None if self.transfer is None else partial(self.transfer.allocate, device=self.device)
        fp8 = engine.kv_cache_dtype == "fp8_e4m3"
        self.cache = KVCache(self.model.kv_spec, kinds, engine.page_size, self._dtype, self.device, memory, fp8)
        self.attention = make_attention(engine.attention_backend, self.cache, self.device)

    def new_scheduler(self) -> Scheduler:
        """A scheduler of this rank's KV blocks, with nothing in them."""
        engine = self.engine
        tables = BlockTables(self.cache.kinds, engine.page_size, not engine.disable_radix_cache)
        max_len = context_length(self.arch, engine)
        return Scheduler(tables, engine.chunked_prefill_size, engine.max_running_requests, max_len)

    def graphs_needed(self) -> tuple[int, ...]:
        """Batch sizes whose decode steps are to be captured; none where it is off or something cannot be."""
        if self.device == "cpu" or self.engine.disable_cuda_graph:
            return ()
        sizes = bucket_sizes(self.engine.cuda_graph_max_bs or self.engine.max_running_requests)
        ranks, tp = self.groups.moe.size, self.groups.dims.attn_tp
        obstacles: dict[int, tuple[str, ...]] = dict.fromkeys(sizes, ())
        if not self.attention.capturable:
            obstacles = dict.fromkeys(sizes, ("the attention backend loops on the host",))
        elif self.arch.moe_layers:
            rows = {size: StepRows((-(-size // tp),) * ranks, is_extend=False) for size in sizes}
            obstacles = {size: self.moe.obstacles(rows[size]) for size in sizes}
        fitting = tuple(size for size in sizes if not obstacles[size])
        if not fitting:
            log.info("decode steps are not captured: %s", "; ".join(obstacles[sizes[0]]))
        return fitting

    @torch.inference_mode()
    def capture(self, sizes: tuple[int, ...], done: Callable[[int], None] = lambda count: None) -> None:
        """Captures decode graphs of ``sizes``; all ranks alike."""
        max_len = context_length(self.arch, self.engine)
        self.graphs = DecodeGraphs(
            self.model,
            self.attention,
            self.groups,
            self.last,
            max_len,
            sizes,
            self.padding,
            self.engine.enable_two_batch_overlap,
            self.device,
            done,
        )

    @torch.inference_mode()
    def launch(self, batch: Batch, ctx: StepContext, waited: Callable[[], None] | None = None) -> Launched:
        """Starts the agreed step; ranks without tokens pass an empty batch.

        Args:
            waited: called, once or more, where the launch itself has to wait for the device; until then nothing of this
                step is known, and all before it is done.
        """
        size = self.graphs.size_for(ctx) if self.graphs is not None else None
        requests = [s.request for s in batch.scheduled if s.samples]
        if size is not None and self.graphs is not None:
            logits, greedy = self.graphs.run(size, batch)
            chosen = self.sampler.choose(logits, requests, greedy) if requests else None
        else:
            self.moe.waited = waited
            due = self._logits(batch, ctx)
            self.moe.waited = None
            chosen = self.sampler.choose(due, requests) if requests else None
        if chosen is not None and (size is None or chosen.tokens_N is not greedy):
            self.last.values[: len(requests)] = chosen.tokens_N.int()
        self.last.sampled(requests)
        return Launched(chosen, self.device)

    def fence(self) -> Callable[[], bool]:
        """What tells whether the device has done all that was launched until now."""
        if self.device == "cpu":
            return lambda: True
        event = torch.cuda.Event()
        event.record()
        return event.query

    def step(self, batch: Batch, ctx: StepContext) -> Sampled:
        """``launch`` and wait."""
        return self.launch(batch, ctx).result()

    def _logits(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Logits [N, V] of the requests that sample; scores the prompts that ask for it on the way."""
        hidden_TD = self.hidden(batch, ctx)
        scored: list[tuple[Request, int]] = []  # and the position before the token to be scored
        scored_rows, due_rows, first = [], [], 0
        for s in batch.scheduled:
            scored += [(s.request, position) for position in s.scored]
            scored_rows += [first + position - s.begin for position in s.scored]
            first += s.num_tokens
            due_rows += [first - 1] if s.samples else []
        (rows,) = to_device([ints(scored_rows + due_rows)], self.device)
        hidden_ND = hidden_TD.index_select(0, rows)
        due: list[Tensor] = []
        for begin in range(0, max(ctx.dp_logit_rows), LOGIT_ROWS):
            dp_rows = tuple(max(0, min(rows - begin, LOGIT_ROWS)) for rows in ctx.dp_logit_rows)
            logits = self.model.logits(hidden_ND[begin : begin + LOGIT_ROWS], dp_rows).float()
            part = scored[begin : begin + LOGIT_ROWS]
            _score(part, logits[: len(part)])
            if len(logits) > len(part):
                due.append(logits[len(part) :])
        return torch.cat(due) if due else hidden_ND.new_empty(0, 1)

    @torch.inference_mode()
    def hidden(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Final hidden states [T, D] of all tokens of the DP group."""
        ids_T, positions_T, rows_T = to_device(token_arrays(batch, self.last), self.device)
        step = self._forward(batch, ctx, positions_T)
        if ctx.first_half is not None:
            rest = tuple(all_ - first for all_, first in zip(ctx.dp_tokens, ctx.first_half))
            contexts = (replace(ctx, dp_tokens=ctx.first_half), replace(ctx, dp_tokens=rest))
            halves, cut = split(batch), split(batch)[0].num_tokens
            first, second = (
                self._forward(half, c, positions)
                for half, c, positions in zip(halves, contexts, (positions_T[:cut], positions_T[cut:]))
            )
            step = replace(step, halves=(first, second))
        tokens_T = resolve_tokens(ids_T, rows_T, self.last)
        return step.layout.gather(self.model.forward(tokens_T, step))

    def _forward(self, batch: Batch, ctx: StepContext, positions_T: Tensor) -> Forward:
        layout = TokenLayout(ctx, self.groups, self.padding)
        assert layout.num_tokens == batch.num_tokens, f"agreed on {layout.num_tokens}, batch has {batch.num_tokens}"
        return Forward(positions_T, layout, self.attention.plan(batch), self.attention)


def _to_host(tokens_N: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there."""
    if not tokens_N.is_cuda:
        return tokens_N.clone(), None
    host = torch.empty(tokens_N.shape, dtype=tokens_N.dtype, pin_memory=True)
    host.copy_(tokens_N, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _score(scored: list[tuple[Request, int]], logits_NV: Tensor) -> None:
    """Adds to each request the logprob of its token after each position."""
    if not scored:
        return
    following = [request.tokens[position + 1] for request, position in scored]
    tops = [request.sampling.prompt_logprobs or 0 for request, _ in scored]
    for (request, _), entry in zip(scored, token_logprobs(logits_NV, following, tops)):
        request.prompt_logprobs.append(entry)
