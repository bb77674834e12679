"""Agree: what all ranks must know of each other before a step, in one small all-gather on the host.

The design is SGLang's (scheduler_dp_attn_mixin): a rank without work runs an empty batch when any other has some, so
that every rank joins every collective. Also owns ``AttentionDpBalance``, which decides from the same numbers, and so
alike on every rank, when new prompts are held back.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import reduce
from operator import and_, or_

import torch

from toolkit.config.engine import AttentionDpConfig
from toolkit.engine.core import StepContext
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Comm


@dataclass(frozen=True)
class Proposal:
    """One rank's part, integers only.

    Attributes:
        tokens, logit_rows, prefill: of the batch it would run; prefill is 0 or 1.
        first_half: tokens in the first half of its batch, -1 when it must not be cut in two.
        busy: 1 when it has any request.
        messages: frontend messages it has seen since start.
        controls: control operations that have reached it and are not carried out.
        shutdown: 1 when it was asked to.
        experts: what its EPLB manager says (``eplb/manager.py``); 0: nothing.
        prompts: waiting requests. generating: requests that decode. slots: requests it could still admit.
        arrived, lost: bits of the transfers that its DP group has open, in order (``disagg/``).
    """

    tokens: int
    logit_rows: int
    prefill: int
    first_half: int
    busy: int = 0
    messages: int = 0
    controls: int = 0
    shutdown: int = 0
    experts: int = 0
    prompts: int = 0
    generating: int = 0
    slots: int = 0
    arrived: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Agreement:
    """What all ranks do alike.

    Attributes:
        asleep: nothing to do anywhere, and all have seen the same number of messages.
        controls: so many control operations have reached all; all carry them out now. shutdown: all end now.
        experts: what every rank's EPLB manager says, by rank.
        by_dp: the proposals of the DP ranks' leaders.
        arrived, lost: transfers that have ended on all ranks of this DP group, and those that failed on one.
    """

    ctx: StepContext
    asleep: bool
    controls: int
    shutdown: bool
    experts: tuple[int, ...]
    by_dp: tuple[Proposal, ...]
    arrived: int = 0
    lost: int = 0


def agree(comm: Comm, dims: ParallelDims, step: int, mine: Proposal) -> Agreement:
    """Exchanges proposals. Every rank calls it once a turn."""
    rows = comm.all_gather(torch.tensor([astuple(mine)]))
    everyone = [Proposal(*row) for row in rows.tolist()]
    by_dp = tuple(everyone[dims.leader(dp)] for dp in range(dims.dp_size))
    ctx = StepContext(
        step,
        dp_tokens=tuple(p.tokens for p in by_dp),
        dp_logit_rows=tuple(p.logit_rows for p in by_dp),
        is_extend=any(p.prefill for p in by_dp),
        first_half=_first_halves(by_dp),
    )
    busy = any(p.busy for p in everyone)
    seen = {p.messages for p in everyone}
    quiet = not busy and not any(p.controls or p.shutdown or p.experts for p in everyone) and len(seen) == 1
    controls = min(p.controls for p in everyone)
    experts = tuple(p.experts for p in everyone)
    group = everyone if comm.size == 1 else [everyone[rank] for rank in dims.dp_group(dims.dp_rank(comm.rank))]
    arrived = reduce(and_, (p.arrived | p.lost for p in group))
    lost = arrived & reduce(or_, (p.lost for p in group))
    shutdown = all(p.shutdown for p in everyone) and not busy
    return Agreement(ctx, quiet, controls, shutdown, experts, by_dp, arrived, lost)


def _first_halves(by_dp: tuple[Proposal, ...]) -> tuple[int, ...] | None:
    """Two-batch overlap runs when nobody objects and all ranks with tokens do the same, prefill or decode."""
    working = {p.prefill for p in by_dp if p.tokens}
    if len(working) != 1 or any(p.first_half < 0 for p in by_dp):
        return None
    return tuple(p.first_half for p in by_dp)


class AttentionDpBalance:
    """Holds new prompts back so that DP ranks prefill in the same steps (TensorRT-LLM's attention_dp_config).

    A step in which one rank prefills is as slow for all ranks as one in which all do. So while ranks decode, new
    prompts wait: when every rank has one, ``batching_wait_iters`` steps more, to gather several; when some rank has
    none, up to ``timeout_iters`` steps. Nothing waits while some rank has nothing to decode: it would idle.
    """

    def __init__(self, config: AttentionDpConfig) -> None:
        self.config = config
        self._waited_for_more = self._waited_for_others = 0

    def hold(self, by_dp: tuple[Proposal, ...]) -> bool:
        """Whether the next step admits no new prompts, given what the ranks last proposed."""
        if not self.config.enable_balance or not any(p.prompts for p in by_dp):
            self._waited_for_more = self._waited_for_others = 0
            return False
        if not all(p.generating for p in by_dp):
            hold = False
        elif all(p.prompts and p.slots for p in by_dp):
            self._waited_for_more += 1
            hold = self._waited_for_more <= self.config.batching_wait_iters
        else:
            self._waited_for_others += 1
            hold = self._waited_for_others <= self.config.timeout_iters
        if not hold:
            self._waited_for_more = self._waited_for_others = 0
        return hold
