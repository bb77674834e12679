"""From a batch to what the device reads: token ids, positions, and where ids come from that are still under way.

The host may schedule a step before the one before it has sampled (``scheduler.Scheduler.can_run_ahead``). Such tokens
are UNKNOWN on the host; on the device they lie in ``LastTokens``, and a step takes them from there itself.
T: tokens of the DP group. Read next: ``runner.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.core import UNKNOWN, Batch, Request
from toolkit.engine.staging import Ints, ints


class LastTokens:
    """What the last steps sampled, on the device, and the row of each request in it."""

    def __init__(self, size: int, device: str) -> None:
        self.values = torch.zeros(size, dtype=torch.int32, device=device)
        self._rows: dict[Request, int] = {}

    def row(self, request: Request) -> int:
        """Where the request's newest token lies, which an unresolved step has sampled."""
        return self._rows[request]

    def sampled(self, requests: Sequence[Request]) -> None:
        """The step just launched leaves the tokens of ``requests`` in the first rows, in this order."""
        self._rows = {request: row for row, request in enumerate(requests)}


def token_arrays(batch: Batch, last: LastTokens, size: int = 0) -> list[Ints]:
    """Ids, positions and rows in ``last`` (-1: the id is known) of the batch's tokens, padded to ``size``."""
    num = max(batch.num_tokens, size)
    ids, positions, rows = np.zeros(num, np.int32), np.zeros(num, np.int32), np.full(num, -1, np.int32)
    first = len(batch.decode)
    if first:
        ids[:first] = [s.request.tokens[s.begin] for s in batch.decode]
        positions[:first] = [s.begin for s in batch.decode]
    for s in batch.prefill:
        end = first + s.num_tokens
        ids[first:end] = s.request.tokens[s.begin : s.end]
        positions[first:end] = np.arange(s.begin, s.end)
        first = end
    unknown = np.flatnonzero(ids == UNKNOWN)
    if len(unknown):
        ends = np.cumsum([s.num_tokens for s in batch.scheduled])
        owners = np.searchsorted(ends, unknown, side="right")
        rows[unknown] = [last.row(batch.scheduled[i].request) for i in owners]
        ids[unknown] = 0
    return [ids, positions, ints(rows)]


def resolve_tokens(ids_T: Tensor, rows_T: Tensor, last: LastTokens) -> Tensor:
    """Ids [T] with those that are under way filled in, on the device."""
    return torch.where(rows_T >= 0, last.values[rows_T.clamp_min(0)], ids_T)
