"""The gate between a load point that has run and one whose figures may be quoted.

A point is valid when tokens flowed, few enough requests failed, answers are as long as asked, the server was not
restarted under it and the client was not the limit. Everything else keeps its figures and is ``invalid``, with every
reason: a comparison leaves it out, a resumed sweep runs it again. Pure. Read next: ``sweep.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.load import LoadConfig
from toolkit.loadgen.proof import VERDICTS
from toolkit.records.requests import NOT_FAILED
from toolkit.records.status import ClientProof

if TYPE_CHECKING:
    import pandas as pd

WORST = {"ok": 0, "degraded": 1, "client_limited": 2}


@dataclass(frozen=True)
class Limits:
    """What a valid point may have at most; ``load.max_*`` of the config."""

    failed_share: float
    wrong_length_share: float
    client: str

    @classmethod
    def of(cls, load: LoadConfig) -> Limits:
        return cls(load.max_failed_share, load.max_wrong_length_share, load.max_client_verdict)


def why_invalid(measured: pd.DataFrame, client: ClientProof, restarted: bool, limits: Limits) -> list[str]:
    """Every reason why the point cannot be trusted; empty: it is valid.

    Args:
        measured: its measured requests, ``records.requests.RequestRecord`` columns.
        restarted: the server's process is another one than before it.
    """
    reasons = []
    ok = measured[measured["status"] == "ok"]
    failed = int((~measured["status"].isin(NOT_FAILED)).sum())
    if not int(measured["output_tokens"].sum()) and not measured["first_token_s"].notna().any():
        reasons.append("no token was generated")
    if failed > limits.failed_share * len(measured):
        reasons.append(
            f"{failed} of {len(measured)} requests failed, more than max_failed_share={limits.failed_share:g}"
        )
    if client.length_mismatches > limits.wrong_length_share * len(ok):
        reasons.append(
            f"{client.length_mismatches} of {len(ok)} answers are not as long as asked, more than "
            f"max_wrong_length_share={limits.wrong_length_share:g}"
        )
    if restarted:
        reasons.append("the server was restarted meanwhile")
    if WORST[client.verdict] > WORST[limits.client]:
        reasons.append(f"{VERDICTS[client.verdict]}: {'; '.join(client.reasons)}")
    return reasons
