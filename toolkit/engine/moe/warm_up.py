"""Compiles what the experts of a model will run, before the first request.

DeepGEMM and Triton compile a kernel when a shape of it is first seen, which takes seconds. Every shape is called here
once, with no rows. Ranks of a node begin at different shapes and find the rest in the cache that they share.
Projections have ``linear_warm_up.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from toolkit.engine.gpu_libraries import compiling
from toolkit.engine.moe.dispatch import Dispatched, ExpertShape
from toolkit.engine.moe.gemm import ExpertGemm, ExpertWeights


def warm_up(
    gemm: ExpertGemm,
    experts: ExpertWeights,
    shape: ExpertShape,
    ranks: int,
    where: float,
    masked: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Calls ``gemm`` with every shape.

    Args:
        ranks: that send rows to these experts.
        where: 0 to 1, the share of the list at which this rank begins.
        masked: some steps bring their rows in the masked layout.
        progress: called with how many shapes are done, of how many.
    """
    cases: list[tuple[int, int, bool]] = []  # rows a slot, alignment, masked layout
    for most, alignment in ((shape.max_rows, shape.alignment), (shape.max_decode_rows, shape.decode_alignment)):
        rows_a_slot = -(-most * ranks * shape.top_k // shape.num_slots)
        cases += [(expected, alignment, False) for expected in gemm.shapes(rows_a_slot, alignment)]
    if masked:
        cases += [(expected, alignment, True) for expected in gemm.shapes(rows_a_slot, alignment)]
    first = int(where * len(cases))
    for done, (expected, alignment, is_masked) in enumerate(cases[first:] + cases[:first], 1):
        with compiling(f"experts-{expected}-{alignment}-{is_masked}"):
            gemm(no_rows(experts, shape, expected, alignment, is_masked))
        progress(done, len(cases))


def no_rows(experts: ExpertWeights, shape: ExpertShape, expected: int, alignment: int, masked: bool) -> Dispatched:
    """What a dispatch that brought nothing looks like; ``expected`` still chooses the kernel."""
    slots, device = shape.num_local, experts.down.device
    size = (slots, max(128, 2 * alignment), shape.hidden) if masked else (2 * alignment, shape.hidden)
    counts = torch.zeros(slots, dtype=torch.int32, device=device)
    x = torch.zeros(size, dtype=torch.bfloat16, device=device)
    weights = None if masked else torch.zeros(len(x), device=device)
    return Dispatched("masked" if masked else "contiguous", x, None, counts, counts, weights, alignment, expected)
