"""Compiles what a model's FP8 projections will run, before the first request.

DeepGEMM chooses a kernel by the shape of the matrix and the number of tiles that the rows make, and compiles it when
it is first chosen, which takes seconds. Every number of tiles is run once here. Ranks of a node begin at different
ones and find the rest in the cache that they share. Experts have ``moe/warm_up.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.fp8 import BlockFp8
from toolkit.engine.gpu_libraries import compiling
from toolkit.engine.layers import linear

SMALL = (16, 32)  # heights of tiles that are used up to as many rows
TILE = 64  # height of the others, or half of it


def warm_up_linears(
    model: object,
    most: int,
    where: float,
    progress: Callable[[int, int], None],
    multiply: Callable[[Tensor, BlockFp8], Tensor] = linear,
) -> None:
    """Multiplies each shape of ``model``'s FP8 matrices with every number of rows that needs another kernel.

    Args:
        most: rows of the largest step.
        where: 0 to 1, the share of the list at which this rank begins.
        progress: called with how many row counts are done, of how many.
    """
    matrices = {matrix.weight_NK.shape: matrix for matrix in fp8_matrices(model)}
    if not matrices:
        return
    sizes = [size for size in (*SMALL, *range(TILE, most + TILE, TILE)) if size < most + TILE]
    first = int(where * len(sizes))
    for done, rows in enumerate(sizes[first:] + sizes[:first], 1):
        with compiling(f"linear-{rows}"):
            for (_, columns), matrix in matrices.items():
                multiply(torch.zeros(rows, columns, dtype=torch.bfloat16, device=matrix.weight_NK.device), matrix)
        progress(done, len(sizes))


def fp8_matrices(root: object) -> Iterator[BlockFp8]:
    """The FP8 matrices that objects of the engine reach from ``root`` by their attributes; experts' are not such."""
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, BlockFp8):
            yield thing
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple):
            waiting += thing
        elif type(thing).__module__.startswith("toolkit.") and hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
        elif hasattr(thing, "__self__"):
            waiting.append(thing.__self__)  # a bound method, as a shared expert is
