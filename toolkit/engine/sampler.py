"""Sampling: logits to tokens. The same seed gives the same token on any rank, batch or mapping.

N: requests that sample in this step, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from toolkit.engine.core import Request


def sample(logits_NV: Tensor, requests: Sequence[Request]) -> list[int]:
    """One token for each request. Temperature 0 is argmax."""
    tokens: list[int] = logits_NV.argmax(-1).tolist() if requests else []
    for i, request in enumerate(requests):
        if request.sampling.temperature > 0:
            tokens[i] = _draw(logits_NV[i], request)
    return tokens


def _draw(logits_V: Tensor, request: Request) -> int:
    """Inverse transform sampling over the sorted probabilities, one uniform number a token.

    The number depends on the request's seed and the token's position alone.
    """
    params = request.sampling
    probs, ids = (logits_V.double() / params.temperature).softmax(-1).sort(descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    # nucleus: the smallest set of best tokens whose mass reaches top_p; never empty
    kept = int((cumulative - probs < params.top_p).sum().clamp_min(1))
    uniform = xxhash.xxh3_64_intdigest(f"{params.seed}/{request.num_output}".encode()) / 2**64
    index = int(torch.searchsorted(cumulative[:kept], uniform * float(cumulative[kept - 1]), right=True))
    return int(ids[min(index, kept - 1)])
