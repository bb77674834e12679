"""Kinds of layers: those with equal attention windows share one pool of KV blocks and one table a request.

A global layer keeps every token; a sliding one keeps what its window still reaches. So a sequence of n tokens costs a
layer min(n, window) cached tokens, rounded up to blocks. Owns these rules and the size of each pool. No torch.
Read next: ``tables.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.config.engine import EngineConfig


@dataclass(frozen=True)
class LayerKind:
    """Layers that see the same tokens.

    Attributes:
        window: tokens that a query sees, its own included; 0: all before it.
        layers: their indices in the model.
        num_blocks: KV blocks of each of these layers.
    """

    window: int
    layers: tuple[int, ...]
    num_blocks: int


def layer_kinds(windows: Sequence[int], engine: EngineConfig) -> tuple[LayerKind, ...]:
    """The kinds of a model whose layer i has ``windows[i]``, those that see furthest first."""
    found = sorted(set(windows), key=lambda window: (window > 0, -window))
    return tuple(
        LayerKind(window, tuple(i for i, w in enumerate(windows) if w == window), _num_blocks(window, engine))
        for window in found
    )


def _num_blocks(window: int, engine: EngineConfig) -> int:
    """Global: ``max_total_tokens``. Sliding: its share by ``swa_full_tokens_ratio``; with 0, what can be in use.

    In use are at most the windows of all running requests and, until a step is over, its new tokens.
    """
    page = engine.page_size
    full = engine.max_total_tokens // page
    if not window:
        return full
    if engine.swa_full_tokens_ratio:
        return int(full * engine.swa_full_tokens_ratio)
    in_use = engine.max_running_requests * (window_blocks(window, page) + 1) - (-engine.chunked_prefill_size // page)
    return min(full, in_use)


def window_blocks(window: int, page_size: int) -> int:
    """The most blocks that ``window`` adjacent tokens lie in."""
    return -(-(window - 1) // page_size) + 1


def first_token(window: int, position: int) -> int:
    """The earliest token that a query at ``position`` sees."""
    return max(0, position - window + 1) if window else 0
