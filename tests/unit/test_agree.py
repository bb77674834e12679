"""What ranks agree on, and when new prompts are held back."""

from __future__ import annotations

from dataclasses import replace

from toolkit.config.engine import AttentionDpConfig
from toolkit.engine.agree import AttentionDpBalance, Proposal, agree
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups, choose_padding

IDLE = Proposal(0, 0, 0, -1, 0, 5, 0, 0, 0, 0, 0, 8)
DECODING = replace(IDLE, busy=1, generating=3)
BOTH = replace(DECODING, prompts=2)


def alone(proposal: Proposal):
    return agree(Groups.single().tp_cpu, ParallelDims(1, 1, 1, 1, None), 7, proposal)


def test_a_step_follows_from_the_proposals() -> None:
    agreed = alone(replace(BOTH, tokens=12, logit_rows=3, prefill=1))
    assert (agreed.ctx.step, agreed.ctx.dp_tokens, agreed.ctx.dp_logit_rows, agreed.ctx.is_extend) == (
        7,
        (12,),
        (3,),
        True,
    )
    assert not agreed.asleep


def test_sleep_and_shutdown_wait_for_work() -> None:
    assert alone(IDLE).asleep
    assert not alone(DECODING).asleep
    assert not alone(replace(IDLE, controls=2)).asleep and alone(replace(IDLE, controls=2)).controls == 2
    assert alone(replace(IDLE, shutdown=1)).shutdown
    assert not alone(replace(DECODING, shutdown=1)).shutdown


def held(balance: AttentionDpBalance, by_dp: tuple[Proposal, ...], most: int = 100) -> int:
    """Steps for which prompts are held."""
    for step in range(most):
        if not balance.hold(by_dp):
            return step
    return most


CONFIG = AttentionDpConfig(enable_balance=True, batching_wait_iters=4, timeout_iters=9)


def test_prompts_on_every_rank_wait_for_a_batch() -> None:
    balance = AttentionDpBalance(CONFIG)
    assert held(balance, (BOTH, BOTH)) == 4
    assert held(balance, (BOTH, BOTH)) == 4, "counting starts again"


def test_a_rank_without_prompts_is_waited_for_until_the_timeout() -> None:
    assert held(AttentionDpBalance(CONFIG), (BOTH, DECODING)) == 9
    full = replace(BOTH, slots=0)
    assert held(AttentionDpBalance(CONFIG), (BOTH, full)) == 9


def test_nothing_waits_while_a_rank_has_nothing_to_decode_or_when_off() -> None:
    assert held(AttentionDpBalance(CONFIG), (BOTH, replace(BOTH, generating=0))) == 0
    assert held(AttentionDpBalance(CONFIG), (BOTH, IDLE)) == 0
    assert held(AttentionDpBalance(AttentionDpConfig()), (BOTH, BOTH)) == 0


def test_padding_rule() -> None:
    assert choose_padding([4, 4, 4, 3], is_extend=False) == "max_len"
    assert choose_padding([8, 0, 0, 1], is_extend=False) == "sum_len"
    assert choose_padding([4, 4], is_extend=True) == "sum_len"
    assert choose_padding([40], is_extend=True) == "max_len"
