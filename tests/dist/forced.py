"""Drives a ModelRunner through the real scheduler with given tokens, and collects the logits of every position."""

from __future__ import annotations

import numpy as np

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.agree import Proposal, agree
from toolkit.engine.arch import context_length, read_arch
from toolkit.engine.core import SamplingParams
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Scheduler


def forced_logits(
    groups: Groups,
    model: ModelConfig,
    engine: EngineConfig,
    sequences: list[list[int]],
    prompt_len: int,
    device: str | None = "cpu",
) -> dict[int, dict[int, np.ndarray]]:
    """Serves ``sequences[i]`` on DP rank i % dp_size, its tokens after ``prompt_len`` forced.

    Args:
        device: None: the GPU of the rank.

    Returns:
        Logits [V] by sequence and position, of this rank's DP group. Positions reused from the prefix cache, and
        the last one, which is never fed back, have none.
    """
    arch = read_arch(model)
    runner = ModelRunner(model, arch, engine, groups, device or f"cuda:{groups.rank}")
    tables = BlockTables(runner.cache.kinds, engine.page_size, not engine.disable_radix_cache)
    scheduler = Scheduler(
        tables, engine.chunked_prefill_size, engine.max_running_requests, context_length(arch, engine)
    )
    dims, dp_rank = groups.dims, groups.dims.dp_rank(groups.rank)
    mine = [i for i in range(len(sequences)) if i % dims.dp_size == dp_rank]
    for i in mine:
        output = SamplingParams(max_tokens=len(sequences[i]) - prompt_len)
        assert scheduler.add(str(i), sequences[i][:prompt_len], output) is None
    logits: dict[int, dict[int, np.ndarray]] = {i: {} for i in mine}
    step = 0
    while True:
        batch = scheduler.schedule()
        # logits of every token are wanted, not only of those that sample
        tokens = batch.num_tokens
        half = split(batch)[0].num_tokens if engine.enable_two_batch_overlap else -1
        agreed = agree(groups.tp_cpu, dims, step, Proposal(tokens, tokens, bool(batch.prefill), half))
        if not any(agreed.ctx.dp_tokens):
            break
        hidden = runner.hidden(batch, agreed.ctx)
        rows = runner.model.logits(hidden, agreed.ctx.dp_logit_rows)
        forced, first = [], 0
        for scheduled in batch.scheduled:
            request = scheduled.request
            for j in range(scheduled.num_tokens):
                logits[int(request.rid)][request.num_computed + j] = rows[first + j].float().cpu().numpy().copy()
            first += scheduled.num_tokens
            if scheduled.samples:
                forced.append(sequences[int(request.rid)][len(request.tokens)])
        scheduler.finish(batch, forced)
        scheduler.audit()
        step += 1
    return logits
