"""Requests served step by step through the real runner and pipeline, without worker and network."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.engine.agree import Proposal, agree
from toolkit.engine.core import UNKNOWN, SamplingParams
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.runner import ModelRunner


def texts(
    runner: ModelRunner, groups: Groups, prompts: Sequence[list[int]], params: Sequence[SamplingParams], ahead: bool
) -> tuple[list[list[int]], int]:
    """What each request of this rank says, and how many steps were launched with a token still unknown.

    Ranks agree on every step, as the worker's do.
    """
    scheduler, found, unknown = runner.new_scheduler(), {}, 0
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        assert scheduler.add(str(i), prompt, p) is None
    numbers: list[int] = []

    def over(step: Step) -> None:
        numbers.append(step.number)
        for output in step.outputs:
            found.setdefault(output.rid, []).extend(output.token_ids)

    pipeline = Pipeline(runner, scheduler, ahead, over)
    for number in range(300):
        pipeline.before_schedule()
        batch = scheduler.schedule()
        half = split(batch)[0].num_tokens if runner.engine.enable_two_batch_overlap else -1
        mine = Proposal(batch.num_tokens, batch.num_logit_rows, bool(batch.prefill), half, busy=not scheduler.idle)
        agreed = agree(groups.tp_cpu, groups.dims, number, mine)
        if not any(agreed.ctx.dp_tokens):
            pipeline.drain()
            if agreed.asleep:
                assert numbers == sorted(numbers)
                return [found[str(i)] for i in range(len(params))], unknown
            continue
        unknown += any(s.request.tokens[s.end - 1] == UNKNOWN for s in batch.scheduled)
        pipeline.launch(batch, agreed.ctx)
    raise AssertionError("the requests did not end")
