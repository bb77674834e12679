"""Late: a sum that is left to the kernel which needs it, so that a step has one kernel less.

What attention or the experts add to the residual stream is followed by the addition and a norm; where it is itself a
sum (of the parts of a product, of what other ranks sent), all of it is one kernel. Knows no layers.
S: rows of this rank's slice, D: hidden. Read next: ``models/decoder.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine import fused

if TYPE_CHECKING:
    from toolkit.engine.layers import RMSNorm

FEW_ROWS = 64  # up to which a product in parts is faster than a library's


@dataclass(frozen=True)
class Late:
    """A sum [S, D] that nobody has made yet. One of the two is called, once.

    Attributes:
        alone: the sum.
        into: residual stream x and a norm -> (x + the sum, the norm of that).
    """

    alone: Callable[[], Tensor]
    into: Callable[[Tensor, RMSNorm], tuple[Tensor, Tensor]]


def now(value: Tensor | Late) -> Tensor:
    """The sum itself."""
    return value.alone() if isinstance(value, Late) else value


def in_parts(x: Tensor, weight: Tensor, early: bool = False) -> Tensor | None:
    """The parts [P, n, N] of such a product, where they are faster than the whole; ``early`` as in ``fused``."""
    most = FEW_ROWS // 2 if early else FEW_ROWS  # beyond it too little of the weight fits beside the rest
    if not 0 < len(x) <= most or x.dtype != torch.bfloat16 or not fused.supported(x) or x.stride(1) != 1:
        return None
    return fused.partial_products(x, weight, early)


def late_linear(x: Tensor, weight: Tensor) -> Tensor | Late:
    """x [n, K] times weight [N, K] transposed; with few rows on a GPU its parts are added up later."""
    parts = in_parts(x, weight)
    if parts is None:
        return F.linear(x, weight)
    return Late(lambda: parts.sum(0).to(x.dtype), lambda residual, norm: fused.add_rms_norm(residual, parts, norm))
